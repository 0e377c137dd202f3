// Multiplier<T>: what a tier multiplies with, and the operands C = A B as it wants them.
//
//   A = left(X), left_transposed(X)      B = right(X), right_transposed(X)
//
// X is some rows of storage type T, row n at x + n * stride, and the operand is made in `to`, room of left_size or right_size
// floats. Here: float32 numbers on vectors. pairs.h: pairs of bfloat16 numbers on vectors. tiles.h: bfloat16 pieces on tiles.
#pragma once

#include "gemm.h"
#include "parallel.h"

namespace sora::SORA_TIER {

#ifdef __AVX512BF16__
constexpr bool kPairs = true;  // whether bfloat16 numbers are multiplied in pairs
#else
constexpr bool kPairs = false;
#endif

}  // namespace sora::SORA_TIER

#ifdef SORA_TILES
#include "tiles.h"
#else

namespace sora::SORA_TIER {

constexpr bool kTiles = false;

template <class T>
struct Multiplier {
  using Left = Matrix;
  struct Right {
    float* data;
    int64_t row;
  };
  struct Session {  // what a thread holds while it multiplies
    Session() {}
  };

  static int64_t left_size(int64_t rows, int64_t depth) { return padded(rows * depth); }
  static int64_t right_size(int64_t depth, int64_t columns) { return depth * padded(columns); }

  static Left left(const T* x, int64_t stride, int rows, int columns, float* to) {
    widen(x, stride, rows, columns, columns, to);
    return {to, columns};
  }
  static Left left_transposed(const T* x, int64_t stride, int rows, int columns, float* to) {
    widen(x, stride, rows, columns, columns, to);
    return left_transposed_at(to, columns, rows);
  }
  // The operand that left_transposed made of an X [depth, rows].
  static Left left_transposed_at(float* to, int rows, int) { return {to, 1, rows}; }

  static Right right(const T* x, int64_t stride, int rows, int columns, float* to) {
    widen(x, stride, rows, columns, padded(columns), to);
    return {to, padded(columns)};
  }
  static Right right_transposed(const T* x, int64_t stride, int rows, int columns, float* to) {
    const int64_t row = padded(rows);
    for (int n = 0; n < rows; n += W)
      each_vector(columns, [&](int64_t i, int lanes) {
        vf block[W];
        for (int j = 0; j < W; ++j) block[j] = n + j < rows ? load_lanes(x + (n + j) * stride + i, lanes) : vf{};
        transpose(block);
        for (int j = 0; j < lanes; ++j) store(to + (i + j) * row + n, block[j]);
      });
    return {to, row};
  }

  // A without its first n rows, or its first n of depth; n is a multiple of kDepth.
  static Left from_row(Left a, int n) { return {a.data + n * a.row, a.row, a.column}; }
  static Left from_depth(Left a, int n) { return {a.data + n * a.column, a.row, a.column}; }
  // B without its first n columns; n is a multiple of 16.
  static Right from_column(Right b, int n) { return {b.data + n, b.row}; }

  // Operands that are filled as they are computed: A [rows, depth] by put_row, a row's columns j to j + 2 W, and B [depth, columns]
  // by put_pair, rows k and k + 1 of columns j to j + W, in whole multiples of kDepth.
  static constexpr bool kRough = sizeof(T) == 2;  // whether 16 bits are all that results keep
  static constexpr bool kInPlace = true;          // whether that may be where the float32 numbers come from
  static constexpr int kDepth = 1;
  static Left left_room(float* to, int, int depth) { return {to, depth}; }
  static Right right_room(float* to, int, int columns) { return {to, padded(columns)}; }
  SORA_INLINE static void put_row(Left a, int i, int j, vf low, vf high) {
    store(a.data + i * a.row + j, low), store(a.data + i * a.row + j + W, high);
  }
  SORA_INLINE static void put_pair(Right b, int k, int j, vf even, vf odd) {
    store(b.data + k * b.row + j, even), store(b.data + (k + 1) * b.row + j, odd);
  }

  // C [rows, columns] (op)= A B. C is written up to whole vectors.
  template <Init init>
  static void multiply(int rows, int columns, int depth, Left a, Right b, float* c, int64_t ldc) {
    gemm<MultiplyAdd>(rows, columns, depth, a, b.data, b.row, ToMatrix<init>{c, ldc});
  }
  // C += A B of an A in parts along the depth.
  static void add_parts(int rows, int columns, const DepthPart<Left>* parts, int count, Right b, float* c, int64_t ldc) {
    for (; count > 0; --count, b.data += parts++->depth * b.row)
      multiply<Init::kAdd>(rows, columns, parts->depth, parts->a, b, c, ldc);
  }
  // A B to an `Out` as gemm.h has it; tiles need room for as many floats on the way, rows and columns rounded up to 16.
  template <class Out>
  static void multiply_to(Out out, int rows, int columns, int depth, Left a, Right b, float*) {
    gemm<MultiplyAdd>(rows, columns, depth, a, b.data, b.row, out);
  }
  // Where the caller will subtract numbers close to C: in two sums or more, of about 64 numbers at most, which round less than one.
  static void multiply_precisely(int rows, int columns, int depth, Left a, Right b, float* c, int64_t ldc) {
    const int parts = depth > 128 ? (depth + 63) / 64 : 2;
    multiply<Init::kZero>(rows, columns, depth / parts, a, b, c, ldc);
    for (int i = 1; i < parts; ++i) {
      const int begin = static_cast<int>(int64_t{depth} * i / parts), end = static_cast<int>(int64_t{depth} * (i + 1) / parts);
      multiply<Init::kAdd>(rows, columns, end - begin, from_depth(a, begin), {b.data + begin * b.row, b.row}, c, ldc);
    }
  }

 private:
  // [rows, width] <- x, widened; columns from `columns` to a whole vector become zero.
  static void widen(const T* x, int64_t stride, int rows, int columns, int64_t width, float* to) {
    for (int n = 0; n < rows; ++n, x += stride, to += width)
      each_vector(columns, [&](int64_t i, int lanes) {
        if (width % W == 0)
          store(to + i, load_lanes(x + i, lanes));
        else
          store_lanes(to + i, load_lanes(x + i, lanes), lanes);
      });
  }
};

}  // namespace sora::SORA_TIER

#ifdef __AVX512BF16__
#include "pairs.h"
#endif
#endif
