// Checks of a call's tensors, of every compiled module. The story files have validated every argument; this keeps a wrong call from
// touching memory that is not there. call.h checks what holds for all tensors, the files of the ops what their kernels rely on.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
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

// Becomes a ValueError that names the module and the op, too.
struct BadArgument {
  std::string text;
};

[[noreturn]] inline void fail(const char* argument, const std::string& expected, const std::string& actual) {
  throw BadArgument{std::string(argument) + ": expected " + expected + ", got " + actual};
}
[[noreturn]] inline void fail(const Tensor& t, const std::string& expected, const std::string& actual) {
  fail(t.name, expected, actual);
}

inline std::string listed(const int64_t* begin, const int64_t* end) {
  std::string text;
  for (const int64_t* n = begin; n != end; ++n) text += (text.empty() ? "" : ", ") + std::to_string(*n);
  return "[" + text + "]";
}
inline std::string shape_of(const Tensor& t) { return t ? "shape " + listed(t.size, t.size + t.ndim) : "None"; }

inline const char* name_of(DType dtype) {
  constexpr const char* kNames[] = {"float32", "bfloat16", "float16", "float64", "int32", "another dtype"};
  return kNames[static_cast<int>(dtype)];
}

// What kernels count in 32 bits: heads, and the elements of a row.
constexpr int64_t kMaxAxis = int64_t{1} << 30;

inline void at_most(const Tensor& t, int axis, int64_t limit = kMaxAxis) {
  if (t.size[axis] > limit) fail(t, "at most " + std::to_string(limit) + " along axis " + std::to_string(axis), shape_of(t));
}

inline void rank(const Tensor& t, int ndim, const char* letters) {
  if (t.ndim != ndim) fail(t, std::string("shape ") + letters, shape_of(t));
}

inline void shape(const Tensor& t, std::initializer_list<int64_t> sizes) {
  if (t.ndim != static_cast<int>(sizes.size()) || !std::equal(sizes.begin(), sizes.end(), t.size))
    fail(t, "shape " + listed(sizes.begin(), sizes.end()), shape_of(t));
}

inline void same_shape(const Tensor& t, const Tensor& as) {
  if (t.ndim != as.ndim || !std::equal(t.size, t.size + t.ndim, as.size)) fail(t, shape_of(as), shape_of(t));
}

inline void dtype(const Tensor& t, DType expected) {
  if (t.dtype != expected) fail(t, name_of(expected), name_of(t.dtype));
}

inline bool is_empty(const Tensor& t) { return std::find(t.size, t.size + t.ndim, 0) != t.size + t.ndim; }

// An axis of one element, or of an empty tensor, may have any stride.
inline void contiguous_rows(const Tensor& t) {
  const int last = t.ndim - 1;
  if (t.size[last] > 1 && t.stride[last] != 1 && !is_empty(t))
    fail(t, "a contiguous last axis", "stride " + std::to_string(t.stride[last]));
}

inline void contiguous(const Tensor& t) {
  if (is_empty(t)) return;
  int64_t stride = 1;
  for (int i = t.ndim - 1; i >= 0; stride *= t.size[i--])
    if (t.size[i] > 1 && t.stride[i] != stride) fail(t, "a contiguous tensor", "strides " + listed(t.stride, t.stride + t.ndim));
}

// Those of them that are present: floats of one dtype that kernels store, whose rows are contiguous. Returns the first.
inline const Tensor* same_storage(std::initializer_list<const Tensor*> tensors) {
  const Tensor* first = nullptr;
  for (const Tensor* t : tensors) {
    if (!*t) continue;
    if (first == nullptr && t->dtype > DType::kFloat16) fail(*t, "float32, bfloat16 or float16", name_of(t->dtype));
    if (first == nullptr) first = t;
    dtype(*t, first->dtype);
    contiguous_rows(*t);
  }
  return first;
}

// Numbers of the kernels' own, such as statistics of rows.
inline void float_table(const Tensor& t, std::initializer_list<int64_t> sizes) {
  shape(t, sizes);
  dtype(t, DType::kFloat32);
  contiguous(t);
}

inline void boundaries(const Tensor& cu, int64_t total) {
  rank(cu, 1, "[entries]");
  dtype(cu, DType::kInt32);
  contiguous(cu);
  if (cu.size[0] < 1) fail(cu, "at least one entry, the leading 0", "none");
  if (!this_module.reads_values) return;
  const int32_t *x = cu.ints(), *end = x + cu.size[0];
  if (x[0] != 0) fail(cu, "a first entry of 0", std::to_string(x[0]));
  if (end[-1] > total) fail(cu, "a last entry of at most " + std::to_string(total), std::to_string(end[-1]));
  if (const int32_t* fall = std::is_sorted_until(x, end); fall != end)
    fail(cu, "entries that never fall", std::to_string(fall[-1]) + " then " + std::to_string(fall[0]));
}

// The tables of a layout: a grid for each span, whose tokens it holds; `others` are float32 rows for each, such as origins.
inline void spans(const Tensor& cu_spans, const Tensor& grid, std::initializer_list<const Tensor*> others, int64_t total) {
  boundaries(cu_spans, total);
  const int64_t count = cu_spans.size[0] - 1;
  shape(grid, {count, 3});
  dtype(grid, DType::kInt32);
  contiguous(grid);
  for (const Tensor* t : others) float_table(*t, {count, 3});
  if (!this_module.reads_values) return;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t *g = grid.ints() + 3 * i, tokens = cu_spans.ints()[i + 1] - cu_spans.ints()[i];
    int64_t held = int64_t{g[0]} * g[1];  // below 2^62
    const bool overflow = __builtin_mul_overflow(held, int64_t{g[2]}, &held);
    if (g[0] < 0 || g[1] < 0 || g[2] < 0 || overflow || held != tokens)
      fail(grid, "sizes >= 0 that hold the " + std::to_string(tokens) + " tokens of span " + std::to_string(i),
           "(" + std::to_string(g[0]) + ", " + std::to_string(g[1]) + ", " + std::to_string(g[2]) + ")");
  }
}

}  // namespace sora
