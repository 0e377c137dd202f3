// Turns a torch.Tensor argument into a sora::Tensor, and memory of ours into a torch.Tensor, through DLPack's C exchange API: no
// copy, no torch header.
//
// torch >= 2.10 publishes a table of functions as torch.Tensor.__dlpack_c_exchange_api__ (DLPack 1.3). One of them fills in a
// DLTensor from a Python object in some 30 ns, so an argument costs about as much as an int. The view is valid while the caller
// holds the tensor, that is, during the call. The structs below are DLPack's ABI, which is frozen.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "tensor.h"

namespace dlpack {

struct Device {
  int32_t type, id;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
enum DeviceType : int32_t { kCpu = 1, kCuda = 2 };
enum Code : uint8_t { kInt = 0, kFloat = 2, kBfloat = 4 };
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* sizes;
  int64_t* strides;
  uint64_t byte_offset;
};
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
  py::object capsule = py::getattr(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__", py::none());
  if (capsule.is_none()) return nullptr;
  auto* api = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api == nullptr) throw py::error_already_set();
  if (api->version.major != 1) return nullptr;
  known_type = type;
  return known_api = api;
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
    if (view.ndim < 1 || view.ndim > sora::Tensor::kMaxDims) return false;
    value.data = static_cast<char*>(view.data) + view.byte_offset;
    value.device_type = view.device.type, value.device_id = view.device.id;
    value.ndim = view.ndim;
    value.dtype = dtype_of(view.dtype);
    value.item_bytes = (view.dtype.bits * view.dtype.lanes + 7) / 8;
    for (int i = view.ndim - 1; i >= 0; --i) {
      value.size[i] = view.sizes[i];
      // Without strides it is contiguous. Sizes whose product is too large are refused before anything reads a stride.
      value.stride[i] = view.strides ? view.strides[i] : i + 1 == view.ndim ? 1 : wrapped(value.stride[i + 1], view.sizes[i + 1]);
    }
    return true;
  }

 private:
  static int64_t wrapped(int64_t a, int64_t b) {
    int64_t product;
    (void)__builtin_mul_overflow(a, b, &product);
    return product;
  }
  static sora::DType dtype_of(dlpack::DataType type) {
    if (type.lanes != 1) return sora::DType::kOther;
    if (type.code == dlpack::kFloat && type.bits == 32) return sora::DType::kFloat32;
    if (type.code == dlpack::kFloat && type.bits == 16) return sora::DType::kFloat16;
    if (type.code == dlpack::kFloat && type.bits == 64) return sora::DType::kFloat64;
    if (type.code == dlpack::kBfloat && type.bits == 16) return sora::DType::kBfloat16;
    if (type.code == dlpack::kInt && type.bits == 32) return sora::DType::kInt32;
    return sora::DType::kOther;
  }
};

}  // namespace pybind11::detail
