// The one matrix-product kernel of this package: C[m, n] (op)= sum_k A(m, k) * B[k, n], all float32.
//
// B and C are row-major with n on the vector lanes; A is read one broadcast element at a time, so it may have any strides and
// serves transposed operands for free. A tile of MR x NV vectors of C stays in registers over the whole k loop: for each k it costs
// NV loads of B and MR broadcasts for MR * NV fused multiply-adds, which keeps the multipliers, not the loads, busy. `Step` is that
// multiply-add; pairs.h has another, for which an element is a word of two numbers.
#pragma once

#include "simd.h"

namespace sora::SORA_TIER {

// 32 registers hold 24 accumulators and the operands, 16 registers 12.
constexpr int kTileRows = 6;
constexpr int kTileVectors = W == 16 ? 4 : 2;

enum class Init {
  kZero,  // C = A B
  kAdd,   // C = C + A B
};

struct Matrix {  // an operand: element (i, j) is data[i * row + j * column]
  float* data;
  int64_t row, column = 1;
};

struct MultiplyAdd {
  SORA_INLINE static vf add(vf sum, vf a, vf b) { return sum + a * b; }
};

template <int MR, int NV, Init init, class Step>
__attribute__((noinline)) void gemm_tile(int k_size, Matrix a, const float* b, int64_t ldb, float* c, int64_t ldc) {
  vf acc[MR][NV] = {};
  const float* a_k = a.data;
  for (int k = 0; k < k_size; ++k, b += ldb, a_k += a.column) {
    vf b_n[NV];
#pragma GCC unroll 12
    for (int n = 0; n < NV; ++n) b_n[n] = load(b + n * W);
#pragma GCC unroll 12
    for (int m = 0; m < MR; ++m) {
      vf a_m = broadcast(a_k[m * a.row]);
#pragma GCC unroll 12
      for (int n = 0; n < NV; ++n) acc[m][n] = Step::add(acc[m][n], a_m, b_n[n]);
    }
  }
  // What C held joins last: sums of one k loop each round less than one long chain.
#pragma GCC unroll 12
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 12
    for (int n = 0; n < NV; ++n) {
      float* to = c + m * ldc + n * W;
      if (init == Init::kAdd) acc[m][n] += load(to);
      store(to, acc[m][n]);
    }
}

template <int MR, int NV, Init init, class Step>
inline void gemm_rows(int rows, int k_size, Matrix a, const float* b, int64_t ldb, float* c, int64_t ldc) {
  for (; rows >= MR; rows -= MR) {
    gemm_tile<MR, NV, init, Step>(k_size, a, b, ldb, c, ldc);
    a.data += MR * a.row;
    c += MR * ldc;
  }
  if constexpr (MR > 1)
    if (rows > 0) gemm_rows<MR - 1, NV, init, Step>(rows, k_size, a, b, ldb, c, ldc);
}

// m_size x n_size x k_size; n_size is rounded up to whole vectors, so B and C must be readable and writable up to there.
template <Init init, class Step = MultiplyAdd, int NV = kTileVectors>
inline void gemm(int m_size, int n_size, int k_size, Matrix a, const float* b, int64_t ldb, float* c, int64_t ldc) {
  int n = 0;
  for (; n + (NV - 1) * W < n_size; n += NV * W) gemm_rows<kTileRows, NV, init, Step>(m_size, k_size, a, b + n, ldb, c + n, ldc);
  if constexpr (NV > 1)
    if (n < n_size) gemm<init, Step, NV - 1>(m_size, n_size - n, k_size, a, b + n, ldb, c + n, ldc);
}

}  // namespace sora::SORA_TIER
