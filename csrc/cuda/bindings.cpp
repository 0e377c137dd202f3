// Module _cuda: the kernels behind the checks of csrc/bindings, and what they need of torch.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "../bindings/adaln.h"
#include "../bindings/bias_gelu.h"
#include "../bindings/norm_rope.h"
#include "../bindings/patchify.h"
#include "../bindings/rope.h"
#include "../dlpack.h"
#include "kernels.h"
#include "runtime.h"

#ifndef SORA_DEVICE_TYPE
#define SORA_DEVICE_TYPE ::dlpack::kCuda
#endif

namespace sora::cuda {

// The table of torch.Tensor, looked up at import: kernels run without the GIL.
static const dlpack::ExchangeApi* api = nullptr;

cudaStream_t current_stream(const Tensor& like) {
  void* stream = nullptr;
  if (api->current_stream(like.device_type, like.device_id, &stream) != 0) {
    py::gil_scoped_acquire acquire;
    throw py::error_already_set();
  }
  return static_cast<cudaStream_t>(stream);
}

Allocation allocate(const Tensor& like, int64_t floats) {
  dlpack::Tensor prototype{};
  prototype.device = {like.device_type, like.device_id}, prototype.dtype = {dlpack::kFloat, 32, 1};
  prototype.ndim = 1, prototype.sizes = &floats;
  dlpack::ManagedTensor* managed = nullptr;
  std::string message;
  const auto set_error = [](void* context, const char* kind, const char* text) {
    *static_cast<std::string*>(context) = std::string(kind) + ": " + text;
  };
  if (api->allocate(&prototype, &managed, &message, set_error) != 0) {
    py::gil_scoped_acquire acquire;  // to raise what torch raises, for callers that then try less at once
    const bool full = message.find("out of memory") != std::string::npos;
    const py::object type =
        full ? py::module_::import("torch").attr("OutOfMemoryError") : py::reinterpret_borrow<py::object>(PyExc_RuntimeError);
    const std::string text = "sora_kernels: no " + std::to_string(floats * sizeof(float)) + " bytes of scratch memory: " + message;
    PyErr_SetString(type.ptr(), text.c_str());
    throw py::error_already_set();
  }
  return {reinterpret_cast<float*>(static_cast<char*>(managed->tensor.data) + managed->tensor.byte_offset), managed};
}

void release(void* owner) {
  auto* managed = static_cast<dlpack::ManagedTensor*>(owner);
  managed->deleter(managed);
}

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of sora_kernels, writing into outputs the caller allocated.";
  this_module = {"sora_kernels._cuda", false, SORA_DEVICE_TYPE};
  py::object tensor = py::module_::import("torch").attr("Tensor");
  api = dlpack::exchange_api(reinterpret_cast<PyTypeObject*>(tensor.ptr()));
  if (api == nullptr) throw py::import_error("torch >= 2.10 is needed: torch.Tensor has no DLPack exchange table");
  m.def("archs", archs, "The GPU architectures this module was built for.");
  m.def("unavailable", unavailable, "Why nothing of this module can run on the present GPU, or None.");
  static const Kernels kernels = {SORA_SHARED_KERNELS(SORA_ADDRESS)};
  bind_rope(m, &kernels);
  bind_norm_rope(m, &kernels);
  bind_adaln(m, &kernels);
  bind_bias_gelu(m, &kernels);
  bind_patchify(m, &kernels);
}

}  // namespace sora::cuda
