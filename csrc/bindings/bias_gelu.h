// gelu(x + bias): decodes and checks the arguments, for the entry points of a table `kernels`.
#pragma once

#include <pybind11/pybind11.h>

#include "../arguments.h"
#include "../dlpack.h"
#include "checks.h"

namespace sora {

namespace py = pybind11;

inline void run_bias_gelu(const BiasGelu& a, void (*kernel)(const BiasGelu&)) {
  require(a.x.ndim == 2, "[N, D] expected");
  same_storage({&a.x, &a.bias, &a.out, &a.dout, &a.dx, &a.dbias});
  for (const Tensor* t : {&a.out, &a.dout, &a.dx})
    if (*t) same_shape(*t, a.x);
  for (const Tensor* t : {&a.bias, &a.dbias})
    if (*t) shape(*t, {a.x.size[1]});
  py::gil_scoped_release release;
  kernel(a);
}

template <class Kernels>
void bind_bias_gelu(py::module_& m, const Kernels* kernels) {
  m.def("bias_gelu_forward", [=](Tensor x, Tensor bias, Tensor out) {
    BiasGelu a{};
    a.x = x, a.bias = bias, a.out = out;
    present({&x, &out});
    run_bias_gelu(a, kernels->bias_gelu_forward);
  });
  m.def("bias_gelu_backward", [=](Tensor dout, Tensor x, Tensor bias, Tensor dx, Tensor dbias) {
    BiasGelu a{};
    a.dout = dout, a.x = x, a.bias = bias, a.dx = dx, a.dbias = dbias;
    present({&dout, &x, &dx});
    run_bias_gelu(a, kernels->bias_gelu_backward);
  });
}

}  // namespace sora
