// Vectors of float32, in GCC/Clang's vector extensions: one source for every instruction set.
//
// SORA_TIER names the namespace of the tier being compiled, and SORA_VECTOR_BYTES its vector width. The compiler turns the
// operators below into that tier's instructions. Storage types are widened to float32 on load and rounded to nearest even on store.
//
// Code of a tier must not instantiate templates of the standard library: the linker keeps one copy of each. If that is the AVX-512
// one, the baseline tier dies on an older machine.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace sora::SORA_TIER {

constexpr int W = SORA_VECTOR_BYTES / 4;  // floats in a vector

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

#define SORA_INLINE inline __attribute__((always_inline))

template <class To, class From>
SORA_INLINE To bits(const From& from) {
  To to;
  static_assert(sizeof to == sizeof from);
  memcpy(&to, &from, sizeof to);
  return to;
}

SORA_INLINE vf broadcast(float x) { return x - vf{}; }

SORA_INLINE vi lanes() {
  vi index;
  for (int i = 0; i < W; ++i) index[i] = i;
  return index;
}

// A mask of the first n lanes.
SORA_INLINE vi lanes_below(int n) { return lanes() < n; }

// A maximum that keeps `a` where `b` is NaN.
SORA_INLINE vf max(vf a, vf b) { return b > a ? b : a; }

// Whether any lane of a comparison holds.
SORA_INLINE bool any(vi x) {
  int32_t result = 0;
  for (int i = 0; i < W; ++i) result |= x[i];
  return result != 0;
}

// A sum of many vectors, kept in float64.
class Total {
 public:
  SORA_INLINE void add(vf x) { sum_ += __builtin_convertvector(x, vd); }
  SORA_INLINE void add_product(vf x, vf y) { sum_ += __builtin_convertvector(x, vd) * __builtin_convertvector(y, vd); }
  SORA_INLINE vf value() const { return __builtin_convertvector(sum_, vf); }
  SORA_INLINE float total() const {
    double sum = 0;
    for (int i = 0; i < W; ++i) sum += sum_[i];
    return static_cast<float>(sum);
  }

 private:
  typedef double vd __attribute__((vector_size(W * 8)));
  vd sum_ = {};
};

// ---- float32 <-> storage

SORA_INLINE vu zero_extend(vh h) {
#if SORA_VECTOR_BYTES == 64
  // GCC 12 makes four instructions of the conversion. Masked, as it takes the plain form to read an uninitialised vector.
  return bits<vu>(_mm512_maskz_cvtepu16_epi32(0xffff, bits<__m256i>(h)));
#else
  return __builtin_convertvector(h, vu);
#endif
}

SORA_INLINE vf widen(vh h, bfloat16) { return bits<vf>(zero_extend(h) << 16); }

SORA_INLINE vf widen(vh h, float16) {
#if SORA_VECTOR_BYTES == 64
  return bits<vf>(_mm512_maskz_cvtph_ps(0xffff, bits<__m256i>(h)));
#elif SORA_VECTOR_BYTES == 32
  return bits<vf>(_mm256_cvtph_ps(bits<__m128i>(h)));
#else
  vu u = zero_extend(h);
  // Moving exponent and mantissa into place leaves the exponent 112 too small; the product repairs it, subnormals included.
  vu magnitude = bits<vu>(bits<vf>((u & 0x7fff) << 13) * 0x1p112f);
  magnitude = (u & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000 : magnitude;  // infinity and NaN
  return bits<vf>(magnitude | (u & 0x8000) << 16);
#endif
}

SORA_INLINE vh narrow(vf x, bfloat16) {
#ifdef __AVX512BF16__
  return bits<vh>(_mm512_cvtneps_pbh(bits<__m512>(x)));  // rounds as below, but subnormal numbers to zero
#else
  vu u = bits<vu>(x);
  vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  rounded = x != x ? (u >> 16) | 0x40 : rounded;  // rounding up could turn a NaN into infinity
  return __builtin_convertvector(rounded, vh);
#endif
}

SORA_INLINE vh narrow(vf x, float16) {
#if SORA_VECTOR_BYTES == 64
  return bits<vh>(_mm512_maskz_cvtps_ph(0xffff, bits<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
#elif SORA_VECTOR_BYTES == 32
  return bits<vh>(_mm256_cvtps_ph(bits<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
#else
  vu u = bits<vu>(x), magnitude = u & 0x7fffffff;
  // A normal result: rebias the exponent by -112 and round at bit 13. A value that rounds past 65504 becomes infinity by itself.
  vu normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // A subnormal result: adding 0.5 aligns its last bit with float32's, and the addition rounds.
  vu subnormal = bits<vu>(bits<vf>(magnitude) + 0.5f) - 0x3f000000;
  vu half = magnitude < 0x38800000 ? subnormal : normal;
  half = magnitude >= 0x47800000 ? vu{} + 0x7c00 : half;
  half = magnitude > 0x7f800000 ? vu{} + 0x7e00 : half;
  return __builtin_convertvector(half | (u >> 31) << 15, vh);
#endif
}

SORA_INLINE vf load(const float* p) {
  vf x;
  memcpy(&x, p, sizeof x);
  return x;
}
SORA_INLINE void store(float* p, vf x) { memcpy(p, &x, sizeof x); }

template <class T>
SORA_INLINE vf load(const T* p) {
  vh h;
  memcpy(&h, p, sizeof h);
  return widen(h, T{});
}
template <class T>
SORA_INLINE void store(T* p, vf x) {
  vh h = narrow(x, T{});
  memcpy(p, &h, sizeof h);
}

// The last n < W elements of a row; the other lanes are zero.
template <class T>
SORA_INLINE vf load(const T* p, int n) {
  T padded[W] = {};
  memcpy(padded, p, n * sizeof(T));
  return load(padded);
}
template <class T>
SORA_INLINE void store(T* p, vf x, int n) {
  T padded[W];
  store(padded, x);
  memcpy(p, padded, n * sizeof(T));
}

// Single elements, by the same rounding.
template <class T>
SORA_INLINE float to_float(T x) {
  return load(&x, 1)[0];
}
template <class T>
SORA_INLINE void from_float(float x, T& to) {
  store(&to, vf{} + x, 1);
}
SORA_INLINE float to_float(float x) { return x; }
SORA_INLINE void from_float(float x, float& to) { to = x; }

// Calls body(i, n) for each vector of a row of `length` elements: n is W, but in a last partial one.
template <class Body>
SORA_INLINE void each_vector(int64_t length, Body body) {
  int64_t i = 0;
  for (; i + W <= length; i += W) body(i, W);
  if (i < length) body(i, static_cast<int>(length - i));
}
template <class T>
SORA_INLINE vf load_lanes(const T* p, int n) {
  return n == W ? load(p) : load(p, n);
}
template <class T>
SORA_INLINE void store_lanes(T* p, vf x, int n) {
  if (n == W)
    store(p, x);
  else
    store(p, x, n);
}

// Row n of x [N, D].
template <class T>
SORA_INLINE T* row(const Tensor& x, int64_t n) {
  return static_cast<T*>(x.data) + n * x.stride[0];
}

// to += from, both [length].
SORA_INLINE void add_row(float* to, const float* from, int64_t length) {
  each_vector(length,
              [=](int64_t i, int lanes) { store_lanes(to + i, load_lanes(to + i, lanes) + load_lanes(from + i, lanes), lanes); });
}

// A vector of the column sums of `count` rows, `stride` apart, from `first` on.
SORA_INLINE vf column_sum(const float* first, int64_t stride, int64_t count, int lanes) {
  Total total;
  for (int64_t n = 0; n < count; ++n) total.add(load_lanes(first + n * stride, lanes));
  return total.value();
}

// Calls body(T{}) with the storage type; the bindings let no other dtype through.
template <class Body>
void dispatch(DType dtype, Body body) {
  if (dtype == DType::kFloat32) body(float{});
  if (dtype == DType::kBfloat16) body(bfloat16{});
  if (dtype == DType::kFloat16) body(float16{});
}

// Lane i of the result is lane index(i) of a and b laid end to end; index must be known at compile time.
template <class Index>
SORA_INLINE vf shuffle(vf a, vf b, Index index) {
#ifdef __clang__
  vf result;  // clang folds the unrolled loop into one shuffle
  for (int i = 0; i < W; ++i) result[i] = index(i) < W ? a[index(i)] : b[index(i) - W];
  return result;
#else
  vi order;
  for (int i = 0; i < W; ++i) order[i] = index(i);
  return __builtin_shuffle(a, b, order);
#endif
}

SORA_INLINE vf swap_pairs(vf x) {
  return shuffle(x, x, [](int i) { return i ^ 1; });
}

// The sum of all lanes, each added to the one half as many lanes away.
template <int S = W / 2>
SORA_INLINE float sum(vf x) {
  if constexpr (S > 0)
    return sum<S / 2>(x + shuffle(x, x, [](int i) { return i ^ S; }));
  else
    return x[0];
}

// Transposes a W x W block in W vectors: log2(W) rounds, each swapping the off-diagonal quarters of its 2S x 2S blocks.
template <int S = 1>
SORA_INLINE void transpose(vf (&row)[W]) {
  if constexpr (S < W) {
    for (int i = 0; i < W; ++i) {
      if (i & S) continue;
      vf a = row[i], b = row[i + S];
      row[i] = shuffle(a, b, [](int j) { return j & S ? W + (j ^ S) : j; });
      row[i + S] = shuffle(a, b, [](int j) { return j & S ? W + j : j ^ S; });
    }
    transpose<2 * S>(row);
  }
}

}  // namespace sora::SORA_TIER
