// What attention's forward and backward share: rows of a head, and how products of queries and keys become scores.
#pragma once

#include "mask.h"
#include "multiplier.h"
#include "parallel.h"

namespace sora::SORA_TIER {

constexpr float kLog2E = 1.44269504f;

// Rows of one head of one sample: token n is at data + n * stride.
template <class T>
struct Rows {
  T* data;
  int64_t stride;
  Rows(const Tensor& x, int64_t batch, int64_t start, int64_t head) {
    const bool dense = x.ndim == 4;
    stride = x.stride[dense ? 1 : 0];
    data = static_cast<T*>(x.data) + (dense ? batch * x.stride[0] : 0) + start * stride + head * x.stride[dense ? 2 : 1];
  }
  T* operator[](int64_t n) const { return data + n * stride; }
};

// lse is [B, H, S] dense, [H, N] packed.
inline double* lse_row(const Tensor& lse, const Sample& s, int64_t head) {
  double* data = static_cast<double*>(lse.data);
  return lse.ndim == 3 ? data + s.q_batch * lse.stride[0] + head * lse.stride[1] : data + head * lse.stride[0] + s.q_start;
}

inline int heads(const Tensor& x) { return static_cast<int>(x.size[x.ndim - 2]); }
inline int head_dim(const Tensor& x) { return static_cast<int>(x.size[x.ndim - 1]); }

inline int clamp(int x, int low, int high) { return x < low ? low : x > high ? high : x; }
inline int at_most(int64_t size, int limit) { return static_cast<int>(size < limit ? size : limit); }

// The keys of a block between the first and the last that a panel sees: `count` after `skipped`, both whole tiles, or the block
// ends.
struct BlockPart {
  int skipped, count;
  template <class Mask>
  BlockPart(const Mask& mask, int64_t block, int num_keys)
      : skipped(mask.k_begin > block ? at_most(mask.k_begin - block, num_keys) / 32 * 32 : 0),
        count(at_most((mask.k_end - block + 31) / 32 * 32, num_keys) - skipped) {}
};

// rows begin..begin+count <- src [d, ld] transposed, column q times factor[q].
template <class T>
void put_transposed(const float* src, int ld, const float* factor, Rows<T> rows, int64_t begin, int count, int d) {
  for (int q = 0; q < count; q += W) {
    const vf f = load(factor + q);
    each_vector(d, [&](int64_t i, int lanes) {
      vf block[W];
      for (int j = 0; j < W; ++j) block[j] = j < lanes ? load(src + (i + j) * ld + q) * f : vf{};
      transpose(block);
      for (int j = 0; j < W && q + j < count; ++j) store_lanes(rows[begin + q + j] + i, block[j], lanes);
    });
  }
}

// What turns products into scores beyond the mask, for one head of one sample: scale, soft cap, additive mask and ALiBi. A positive
// scale alone is left to the exponential: `log2_scale` is what scores are still to be multiplied by to be exponents of 2.
struct ScoreTerms {
  bool any;
  float scale, log2_scale;
  float cap;  // 0: none
  const float* bias;
  int64_t bias_q, bias_k;
  float slope;
  int64_t diagonal;  // Sk - S

  ScoreTerms(const Attention& a, const Sample& s, int head)
      : scale(a.scale), cap(a.softcap), bias(nullptr), slope(0), diagonal(s.k_size - s.q_size) {
    if (a.bias) {
      bias = static_cast<const float*>(a.bias.data) + s.q_batch * a.bias.stride[0] + head * a.bias.stride[1];
      bias_q = a.bias.stride[2], bias_k = a.bias.stride[3];
    }
    if (a.alibi) {
      const int64_t b = &s - a.samples;
      slope = static_cast<const float*>(a.alibi.data)[b * a.alibi.stride[0] + head * a.alibi.stride[1]];
    }
    any = cap > 0 || bias != nullptr || slope != 0 || !(scale > 0);
    log2_scale = any ? kLog2E : scale * kLog2E;
  }

  // s [num_keys, ld] in place; `slopes` (or null) receives d capped / d raw.
  void apply(float* s, int ld, int64_t q_begin, int num_queries, int64_t k_begin, int num_keys, float* slopes) const {
    for (int j = 0; j < num_keys; ++j)
      for (int c = 0; c < num_queries; c += W) {
        float* p = s + j * ld + c;
        vf x = load(p) * scale;
        if (cap > 0) {
          vf t = tanh(x * (1 / cap));
          x = t * cap;
          if (slopes != nullptr) store(slopes + j * ld + c, 1.0f - t * t);
        }
        if (bias != nullptr) {
          vf b = {};
          for (int i = 0; i < W && c + i < num_queries; ++i) b[i] = bias[(q_begin + c + i) * bias_q + (k_begin + j) * bias_k];
          x += b;
        }
        if (slope != 0) {
          vf distance = __builtin_convertvector(lanes() + static_cast<int32_t>(q_begin + c + diagonal - k_begin - j), vf);
          x -= bits<vf>(bits<vu>(distance) & 0x7fffffff) * slope;
        }
        store(p, x);
      }
  }
};

// Zeroes the rows of a packed tensor [N, H, d] past the last boundary.
template <class T>
void zero_slack(const Tensor& x, int64_t used) {
  if (x.ndim == 4) return;
  for (int64_t n = used; n < x.size[0]; ++n)
    for (int64_t h = 0; h < x.size[1]; ++h) memset(Rows<T>(x, 0, n, h).data, 0, x.size[2] * sizeof(T));
}

}  // namespace sora::SORA_TIER
