// DLPack's description of a tensor, and what we make of it. No Python here: tests/reliability/fuzz_dlpack.cpp runs this on bytes.
//
// The structs are DLPack's ABI, which is frozen. What they say may come from any library, so nothing is believed that can be
// checked here; that their memory is there is not among it. bindings/call.h checks sizes and strides.
#pragma once

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

inline sora::DType dtype_of(DataType type) {
  if (type.lanes != 1) return sora::DType::kOther;
  if (type.code == kFloat && type.bits == 32) return sora::DType::kFloat32;
  if (type.code == kFloat && type.bits == 16) return sora::DType::kFloat16;
  if (type.code == kFloat && type.bits == 64) return sora::DType::kFloat64;
  if (type.code == kBfloat && type.bits == 16) return sora::DType::kBfloat16;
  if (type.code == kInt && type.bits == 32) return sora::DType::kInt32;
  return sora::DType::kOther;
}

// Fills in `t`; false of what is no tensor of 1 to kMaxDims axes, of elements of 1 to 16 bytes as torch has them.
inline bool decode(const Tensor& view, sora::Tensor& t) {
  if (view.ndim < 1 || view.ndim > sora::Tensor::kMaxDims || view.sizes == nullptr) return false;
  t.item_bytes = (view.dtype.bits * view.dtype.lanes + 7) / 8;
  if (t.item_bytes < 1 || t.item_bytes > 16) return false;  // sizes in bytes must not overflow
  // Added as numbers: where there is no memory, there is nothing to point past.
  t.data = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(view.data) + view.byte_offset);
  t.device_type = view.device.type, t.device_id = view.device.id;
  t.ndim = view.ndim;
  t.dtype = dtype_of(view.dtype);
  int64_t next = 1;  // the stride if it is contiguous, which it is without strides
  for (int i = view.ndim - 1; i >= 0; --i) {
    t.size[i] = view.sizes[i];
    t.stride[i] = view.strides != nullptr ? view.strides[i] : next;
    // Sizes whose product is too large are refused before anything reads a stride.
    (void)__builtin_mul_overflow(next, view.sizes[i], &next);
  }
  return true;
}

}  // namespace dlpack
