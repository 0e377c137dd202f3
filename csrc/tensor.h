// A view of a strided tensor. It owns nothing: whoever made it keeps the memory alive.
#pragma once

#include <cstdint>

namespace sora {

enum class DType { kFloat32, kBfloat16, kFloat16, kFloat64, kInt32, kOther };

struct Tensor {
  static constexpr int kMaxDims = 6;
  void* data = nullptr;  // null: an optional tensor that is absent
  DType dtype = DType::kOther;
  int32_t device_type = 0, device_id = 0;  // DLPack's numbers
  int ndim = 0;
  int64_t size[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};  // in elements
  int32_t item_bytes = 0;
  const char* name = "";  // of the argument

  // Inlined always: were they left as functions, the linker would share one tier's copy among all tiers.
  __attribute__((always_inline)) explicit operator bool() const { return ndim > 0; }
  __attribute__((always_inline)) const int32_t* ints() const { return static_cast<const int32_t*>(data); }
};

}  // namespace sora
