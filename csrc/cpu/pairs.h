// Matrix products of bfloat16 numbers on vectors, for processors with AVX-512 BF16: an instruction adds to 16 float32 sums two
// products each, twice the work of a multiply-add. Other storage types are multiplied as float32 numbers: multiplier.h.
//
// An operand is stored as words of two numbers adjacent along the sum's index k, and so is a matrix of half the depth that gemm.h
// multiplies as it does float32 ones:
//   A [rows, depth]      word (i, k / 2) = (A[i][k], A[i][k + 1])
//   B [depth, columns]   word (k / 2, j) = (B[k][j], B[k + 1][j])
// So A = X and B = X^T hold X as it is, in rows or transposed, and A = X^T and B = X its rows zipped in twos. A number that an odd
// depth lacks is zero. Numbers are rounded to nearest even, subnormal ones count as zero, and sums round like float32 sums.
#pragma once

#include "gemm.h"
#include "parallel.h"

namespace sora::SORA_TIER {

struct MultiplyAddPairs {
  SORA_INLINE static vf add(vf sum, vf a, vf b) {
    return bits<vf>(_mm512_dpbf16_ps(bits<__m512>(sum), bits<__m512bh>(a), bits<__m512bh>(b)));
  }
};

template <>
struct Multiplier<bfloat16> {
  using Left = Matrix;
  struct Right {
    float* data;
    int64_t row;
  };
  struct Session {
    Session() {}
  };

  static int64_t left_size(int64_t rows, int64_t depth) { return right_size(depth, rows); }
  static int64_t right_size(int64_t depth, int64_t columns) { return padded(words(depth) * padded(columns)); }

  static Left left(const bfloat16* x, int64_t stride, int rows, int columns, float* to) {
    const Left result = left_room(to, rows, columns);
    for (int n = 0; n < rows; ++n, x += stride, to += result.row) {
      if (columns % 2 != 0) to[result.row - 1] = 0;
      memcpy(to, x, columns * sizeof(bfloat16));
    }
    return result;
  }
  static Left left_transposed(const bfloat16* x, int64_t stride, int rows, int columns, float* to) {
    zip(x, stride, rows, columns, to);
    return left_transposed_at(to, columns, rows);
  }
  static Left left_transposed_at(float* to, int rows, int) { return {to, 1, padded(rows)}; }

  static Right right(const bfloat16* x, int64_t stride, int rows, int columns, float* to) {
    zip(x, stride, rows, columns, to);
    return right_room(to, rows, columns);
  }
  static Right right_transposed(const bfloat16* x, int64_t stride, int rows, int columns, float* to) {
    const Right result = right_room(to, columns, rows);
    for (int n = 0; n < rows; n += W)
      for (int k = 0; k < columns; k += 2 * W) {
        const int numbers = columns - k < 2 * W ? columns - k : 2 * W;
        vf block[W];
        for (int j = 0; j < W; ++j) {
          block[j] = vf{};
          if (n + j < rows) memcpy(&block[j], x + (n + j) * stride + k, numbers * sizeof(bfloat16));
        }
        transpose(block);
        for (int j = 0; j < words(numbers); ++j) store(to + (k / 2 + j) * result.row + n, block[j]);
      }
    return result;
  }

  static Left from_row(Left a, int n) { return {a.data + n * a.row, a.row, a.column}; }
  static Left from_depth(Left a, int n) { return {a.data + n / 2 * a.column, a.row, a.column}; }
  static Right from_column(Right b, int n) { return {b.data + n, b.row}; }

  static constexpr bool kRough = true;
  static constexpr bool kInPlace = false;
  static constexpr int kDepth = 2;
  static Left left_room(float* to, int, int depth) { return {to, words(depth)}; }
  static Right right_room(float* to, int, int columns) { return {to, padded(columns)}; }
  SORA_INLINE static void put_row(Left a, int i, int j, vf low, vf high) { store(a.data + i * a.row + j / 2, halves(low, high)); }
  SORA_INLINE static void put_pair(Right b, int k, int j, vf even, vf odd) {
    store(b.data + k / 2 * b.row + j, zipped(halves(even, odd)));
  }

  template <Init init>
  static void multiply(int rows, int columns, int depth, Left a, Right b, float* c, int64_t ldc) {
    gemm<MultiplyAddPairs>(rows, columns, words(depth), a, b.data, b.row, ToMatrix<init>{c, ldc});
  }
  static void add_parts(int rows, int columns, const DepthPart<Left>* parts, int count, Right b, float* c, int64_t ldc) {
    for (; count > 0; --count, b.data += words(parts++->depth) * b.row)
      multiply<Init::kAdd>(rows, columns, parts->depth, parts->a, b, c, ldc);
  }
  template <class Out>
  static void multiply_to(Out out, int rows, int columns, int depth, Left a, Right b, float*) {
    gemm<MultiplyAddPairs>(rows, columns, words(depth), a, b.data, b.row, out);
  }
  static void multiply_precisely(int rows, int columns, int depth, Left a, Right b, float* c, int64_t ldc) {
    multiply<Init::kZero>(rows, columns, depth, a, b, c, ldc);
  }

 private:
  typedef uint16_t vs __attribute__((vector_size(4 * W)));

  static constexpr int words(int64_t numbers) { return static_cast<int>((numbers + 1) / 2); }

  // All numbers of `low`, then of `high`, rounded.
  SORA_INLINE static vf halves(vf low, vf high) { return bits<vf>(_mm512_cvtne2ps_pbh(bits<__m512>(high), bits<__m512>(low))); }

  // Numbers i and W + i of x become word i.
  SORA_INLINE static vf zipped(vf x) {
    vs order;
    for (int i = 0; i < 2 * W; ++i) order[i] = i / 2 + i % 2 * W;
    return bits<vf>(__builtin_shuffle(bits<vs>(x), order));
  }

  // Words (k / 2, j) of pairs of rows of x, [words(rows), padded(columns)].
  static void zip(const bfloat16* x, int64_t stride, int rows, int columns, float* to) {
    const int64_t row = padded(columns);
    for (int k = 0; k < rows; k += 2, x += 2 * stride, to += row)
      each_vector(columns, [&](int64_t i, int lanes) {
        bfloat16 two[2][W] = {};
        memcpy(two[0], x + i, lanes * sizeof(bfloat16));
        if (k + 1 < rows) memcpy(two[1], x + stride + i, lanes * sizeof(bfloat16));
        store(to + i, zipped(bits<vf>(two)));
      });
  }
};

}  // namespace sora::SORA_TIER
