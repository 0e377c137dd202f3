// Defines the entry points of a compiled module, whose tensors call.h checks.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "../dlpack.h"
#include "call.h"

namespace sora {

namespace py = pybind11;

class Call : public CheckedCall {
 public:
  using CheckedCall::CheckedCall;

  // Runs a kernel without the GIL, if it has anything to write.
  template <class Work>
  void run(Work work) const {
    if (!writes()) return;
    py::gil_scoped_release release;
    work();
  }
};

// Defines an entry point whose body(call, arguments...) checks its arguments and then has call.run() run a kernel. The module's
// `signatures` maps its name to the text.
template <class Body, class... Arguments, size_t... i>
void define(py::module_& m, const char* text, Body body, void (Body::*)(const Call&, Arguments...) const,
            std::index_sequence<i...>) {
  const auto* signature = new Signature(text);  // for as long as the module is there
  if (signature->arguments.size() != sizeof...(Arguments)) throw std::logic_error(text);
  const auto entry = [=](Arguments... arguments) {
    const auto where = [&] { return std::string(this_module.name) + ": " + signature->op + ": "; };
    try {
      const Call call(*signature, arguments...);
      body(call, std::move(arguments)...);
    } catch (const BadArgument& error) {
      throw std::invalid_argument(where() + error.text);
    } catch (const std::bad_alloc& error) {
      PyErr_SetString(PyExc_MemoryError, (where() + error.what()).c_str());
      throw py::error_already_set();
    }
  };
  // A None for a tensor is passed on in any case: the error of Call names the argument.
  m.def(
      signature->op.c_str(), entry, text,
      py::arg(signature->arguments[i].name.c_str()).none(std::is_same_v<Arguments, Tensor> || signature->arguments[i].optional)...);
  if (!py::hasattr(m, "signatures")) m.attr("signatures") = py::dict();
  m.attr("signatures")[signature->op.c_str()] = text;
}
template <class Body, class... Arguments>
void define(py::module_& m, const char* text, Body body, void (Body::*call)(const Call&, Arguments...) const) {
  define(m, text, body, call, std::index_sequence_for<Arguments...>());
}
template <class Body>
void define(py::module_& m, const char* text, Body body) {
  define(m, text, body, &Body::operator());
}

}  // namespace sora
