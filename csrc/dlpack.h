// Turns a torch.Tensor argument into a sora::Tensor, and memory of ours into a torch.Tensor, through DLPack's C exchange API: no
// copy, no torch header.
//
// torch >= 2.10 publishes a table of functions as torch.Tensor.__dlpack_c_exchange_api__ (DLPack 1.3). One of them fills in a
// DLTensor from a Python object in some 30 ns, so an argument costs about as much as an int. The view is valid while the caller
// holds the tensor, that is, during the call.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "dlpack_view.h"
#include "tensor.h"

namespace dlpack {

struct Version {
  uint32_t major, minor;
};
struct ManagedTensor {
  Version version;
  void* context;
  void (*deleter)(ManagedTensor* self);
  uint64_t flags;
  Tensor tensor;
};
struct ExchangeApi {
  Version version;
  void* previous;
  // Memory like the prototype (dtype, sizes, device), by the framework's own allocator; reports an error through set_error.
  int (*allocate)(Tensor* prototype, ManagedTensor** out, void* error_context,
                  void (*set_error)(void* error_context, const char* kind, const char* message));
  void* managed_from_object;
  int (*managed_to_object)(ManagedTensor* tensor, void** object);
  int (*tensor_from_object)(void* object, Tensor* out);
  int (*current_stream)(int32_t device_type, int32_t device_id, void** stream);
};

// The table of a tensor type; null if it has none. Every argument of a call has the same type, torch.Tensor or a subclass such as
// Parameter, so the table of the last type is remembered.
inline const ExchangeApi* exchange_api(PyTypeObject* type) {
  static PyTypeObject* known_type = nullptr;
  static const ExchangeApi* known_api = nullptr;
  if (type == known_type) return known_api;
  namespace py = pybind11;
  constexpr const char* kName = "dlpack_exchange_api";
  py::object capsule = py::getattr(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), kName)) return nullptr;
  auto* api = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), kName));
  if (api->version.major != 1 || api->tensor_from_object == nullptr) return nullptr;
  Py_INCREF(type);  // another type must not come to live at its address
  PyTypeObject* before = known_type;
  known_type = type, known_api = api;
  Py_XDECREF(before);
  return api;
}

}  // namespace dlpack

namespace pybind11::detail {

template <>
struct type_caster<sora::Tensor> {
  PYBIND11_TYPE_CASTER(sora::Tensor, const_name("torch.Tensor"));

  bool load(handle source, bool) {
    if (source.is_none()) return true;  // stays empty
    const dlpack::ExchangeApi* api = dlpack::exchange_api(Py_TYPE(source.ptr()));
    if (api == nullptr) return false;
    dlpack::Tensor view;
    if (api->tensor_from_object(source.ptr(), &view) != 0) {  // of a sparse tensor, or one without memory
      PyErr_Clear();
      return false;
    }
    return dlpack::decode(view, value);
  }
};

}  // namespace pybind11::detail
