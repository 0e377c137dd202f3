// The one matrix-product kernel of this package: C[m, n] = sum_k A(m, k) * B[k, n], all float32.
//
// B is row-major with n on the vector lanes; A is read one broadcast element at a time, so it may have any strides and serves
// transposed operands for free. A tile of MR x NV vectors of C stays in registers over the whole k loop: for each k it costs NV
// loads of B and MR broadcasts for MR * NV fused multiply-adds, which keeps the multipliers, not the loads, busy. `Step` is that
// multiply-add; pairs.h has another, for which an element is a word of two numbers. `Out` takes the sums: ToMatrix is one.
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

// A of a product, or some of its depth: parts but the last have multiples of Multiplier's kDepth.
template <class Left>
struct DepthPart {
  Left a;
  int depth;
};

struct MultiplyAdd {
  SORA_INLINE static vf add(vf sum, vf a, vf b) { return sum + a * b; }
};

// put(i, j, x) takes the sums of row i and columns j to j + W; at(i, j) is the same from row i and column j on.
template <Init init>
struct ToMatrix {
  float* c;
  int64_t ldc;
  SORA_INLINE ToMatrix at(int i, int j) const { return {c + i * ldc + j, ldc}; }
  SORA_INLINE void put(int i, int j, vf x) const {
    float* to = c + i * ldc + j;
    // What C held joins last: sums of one k loop each round less than one long chain.
    store(to, init == Init::kAdd ? x + load(to) : x);
  }
};

template <int MR, int NV, class Step, class Out>
__attribute__((noinline)) void gemm_tile(int k_size, Matrix a, const float* b, int64_t ldb, Out out) {
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
#pragma GCC unroll 12
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 12
    for (int n = 0; n < NV; ++n) out.put(m, n * W, acc[m][n]);
}

template <int MR, int NV, class Step, class Out>
inline void gemm_rows(int rows, int k_size, Matrix a, const float* b, int64_t ldb, Out out) {
  for (; rows >= MR; rows -= MR) {
    gemm_tile<MR, NV, Step>(k_size, a, b, ldb, out);
    a.data += MR * a.row;
    out = out.at(MR, 0);
  }
  if constexpr (MR > 1)
    if (rows > 0) gemm_rows<MR - 1, NV, Step>(rows, k_size, a, b, ldb, out);
}

// m_size x n_size x k_size; n_size is rounded up to whole vectors, so B must be readable, and a ToMatrix writable, up to there.
template <class Step, int NV = kTileVectors, class Out>
inline void gemm(int m_size, int n_size, int k_size, Matrix a, const float* b, int64_t ldb, Out out) {
  int n = 0;
  for (; n + (NV - 1) * W < n_size; n += NV * W) gemm_rows<kTileRows, NV, Step>(m_size, k_size, a, b + n, ldb, out.at(0, n));
  if constexpr (NV > 1)
    if (n < n_size) gemm<Step, NV - 1>(m_size, n_size - n, k_size, a, b + n, ldb, out.at(0, n));
}

}  // namespace sora::SORA_TIER
