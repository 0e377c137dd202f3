// Checks of a call's tensors, of every compiled module. The story files have validated every argument; this keeps a wrong call from
// touching memory that is not there.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "../tensor.h"

namespace sora {

// What the checks know of the module they are compiled into, set at import.
struct Module {
  const char* name = "";
  bool reads_values = false;  // of boundaries; kernels of a module that cannot must clamp them
  int32_t device_type = 0;    // DLPack's, of every tensor
};
inline Module this_module;

inline void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(std::string(this_module.name) + ": " + what);
}

inline void on_device(const Tensor& t) { require(t.device_type == this_module.device_type, "a tensor is on another device"); }

// For the tensors that are not optional: None arrives as one without axes, which the checks below pass over.
inline void present(std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* t : tensors) require(static_cast<bool>(*t), "a tensor is missing");
}

inline void same_storage(std::initializer_list<const Tensor*> tensors) {
  DType dtype = DType::kOther;
  for (const Tensor* t : tensors) {
    if (!*t) continue;
    on_device(*t);
    if (dtype == DType::kOther) dtype = t->dtype;
    require(t->dtype == dtype && dtype <= DType::kFloat16, "float tensors of one dtype expected");
    const bool empty = std::find(t->size, t->size + t->ndim, 0) != t->size + t->ndim;  // then its strides may be anything
    require(empty || t->size[t->ndim - 1] == 1 || t->stride[t->ndim - 1] == 1, "the last axis must be contiguous");
  }
}

inline void same_shape(const Tensor& a, const Tensor& b) {
  require(a.ndim == b.ndim && std::equal(a.size, a.size + a.ndim, b.size), "tensors of one shape expected");
}

inline void shape(const Tensor& t, std::initializer_list<int64_t> sizes) {
  require(t.ndim == static_cast<int>(sizes.size()) && std::equal(sizes.begin(), sizes.end(), t.size), "unexpected shape");
}

inline void statistics(const Tensor& t) {
  on_device(t);
  int64_t stride = 1;
  for (int i = t.ndim - 1; i >= 0; stride *= std::max<int64_t>(t.size[i--], 1))
    require(t.dtype == DType::kFloat32 && (t.size[i] <= 1 || t.stride[i] == stride), "statistics must be float32 and contiguous");
}
inline void statistics(const Tensor& t, std::initializer_list<int64_t> sizes) { shape(t, sizes), statistics(t); }

inline void boundaries(const Tensor& cu, int64_t total) {
  require(cu.ndim == 1 && cu.dtype == DType::kInt32 && cu.size[0] >= 1 && (cu.size[0] == 1 || cu.stride[0] == 1),
          "boundaries must be int32 and contiguous");
  on_device(cu);
  if (!this_module.reads_values) return;
  const int32_t* x = cu.ints();
  require(x[0] == 0 && x[cu.size[0] - 1] <= total && std::is_sorted(x, x + cu.size[0]),
          "boundaries must rise from 0 to at most the number of tokens");
}

inline void spans(const Tensor& cu_spans, const Tensor& grid, int64_t total) {
  boundaries(cu_spans, total);
  const int64_t count = cu_spans.size[0] - 1;
  require(grid.dtype == DType::kInt32 && grid.ndim == 2 && grid.size[0] == count && grid.size[1] == 3 &&
              (count == 0 || (grid.stride[0] == 3 && grid.stride[1] == 1)),
          "grid must be int32 [S, 3]");
  on_device(grid);
  if (!this_module.reads_values) return;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t* g = grid.ints() + 3 * i;
    require(g[0] >= 0 && g[1] >= 0 && g[2] >= 0 && int64_t(g[0]) * g[1] * g[2] == cu_spans.ints()[i + 1] - cu_spans.ints()[i],
            "each grid must hold its span's tokens");
  }
}

}  // namespace sora
