// What attention's forward and backward share: rows of a head, and how products of queries and keys become scores.
#pragma once

#include "multiplier.h"
#include "parallel.h"
#include "simd_math.h"

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

// A number per query of a head: x is [B, H, S] dense, [H, N] packed.
inline float* query_row(const Tensor& x, const Sample& s, int64_t head) {
  float* data = static_cast<float*>(x.data);
  return x.ndim == 3 ? data + s.q_batch * x.stride[0] + head * x.stride[1] : data + head * x.stride[0] + s.q_start;
}

// What the backward needs to know of a query: P = 2^(c (S - maximum)) * inverse, of the forward's maximum and sum. Of a query that
// sees nothing the maximum is +inf, so that all P are 0. delta = dO . O is summed in float64, as it is subtracted from numbers
// close to it.
struct QueryStatistics {
  float maximum = __builtin_inff(), inverse = 0, delta = 0;

  QueryStatistics() {}
  template <class T>
  QueryStatistics(float maximum_, float sum, const T* out, const T* dout, int d) {
    if (sum == 0) return;
    maximum = maximum_, inverse = 1 / sum;
    Total total;
    each_vector(d, [&](int64_t i, int lanes) { total.add_product(load_lanes(out + i, lanes), load_lanes(dout + i, lanes)); });
    delta = total.total();
  }
};

// lse of a query's maximum and sum; -inf if it sees nothing. `unit` is ScoreTerms'.
inline float log_sum(float maximum, float sum, double unit) { return static_cast<float>(maximum * unit + __builtin_log(sum)); }

inline int heads(const Tensor& x) { return static_cast<int>(x.size[x.ndim - 2]); }
inline int head_dim(const Tensor& x) { return static_cast<int>(x.size[x.ndim - 1]); }

inline int clamp(int x, int low, int high) { return x < low ? low : x > high ? high : x; }
inline int at_most(int64_t size, int limit) { return static_cast<int>(size < limit ? size : limit); }

// The row of q, row(q), for q in 0..count <- column q of src [d, ld] times factor[q].
template <class Row>
void put_transposed(const float* src, int ld, const float* factor, int count, int d, Row row) {
  for (int q = 0; q < count; q += W) {
    const vf f = load(factor + q);
    each_vector(d, [&](int64_t i, int lanes) {
      vf block[W];
      for (int j = 0; j < W; ++j) block[j] = j < lanes ? load(src + (i + j) * ld + q) * f : vf{};
      transpose(block);
      for (int j = 0; j < W && q + j < count; ++j) store_lanes(row(q + j) + i, block[j], lanes);
    });
  }
}

// What turns products into scores beyond the mask, for one head of one sample: scale, soft cap, additive mask and ALiBi. A positive
// scale alone is left to the exponential: `log2_scale` is what scores are still to be multiplied by to be exponents of 2.
struct ScoreTerms {
  bool any;
  float scale, log2_scale;
  double unit;  // and by this to be natural exponents
  float cap;    // 0: none
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
    log2_scale = any ? kLog2E : scale * kLog2E, unit = any ? 1 : scale;
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

// Scores [num_keys, ld] become probabilities two keys at a time. An odd number of keys gets another one, which is masked out for
// every query and whose dP, if given, is zero. Columns [begin, end), in whole vectors.
inline void complete_pairs(float* scores, float* dp, int num_keys, int ld, int begin, int end) {
  if (num_keys % 2 == 0) return;
  for (int at = num_keys * ld + begin; at < num_keys * ld + end; at += W) {
    store(scores + at, vf{} - __builtin_inff());
    if (dp != nullptr) store(dp + at, vf{});
  }
}

// Zeroes the rows of a packed tensor [N, H, d] past the last boundary.
template <class T>
void zero_slack(const Tensor& x, int64_t used) {
  if (x.ndim == 4 || x.size[1] == 0) return;  // without heads there may be any number of tokens
  for (int64_t n = used; n < x.size[0]; ++n)
    for (int64_t h = 0; h < x.size[1]; ++h) memset(Rows<T>(x, 0, n, h).data, 0, x.size[2] * sizeof(T));
}

// Of a number per query [H, N], those past the last boundary.
inline void fill_slack(const Tensor& x, int64_t used, float value) {
  if (x.ndim != 2) return;
  for (int64_t h = 0; h < x.size[0]; ++h)
    for (int64_t n = used; n < x.size[1]; ++n) static_cast<float*>(x.data)[h * x.stride[0] + n] = value;
}

// The results of queries that see nothing, for those past the last boundary.
template <class T>
void zero_query_slack(const Attention& a) {
  zero_slack<T>(a.out, a.q_used);
  fill_slack(a.maximum, a.q_used, -__builtin_inff());
  fill_slack(a.sum, a.q_used, 0);
  if (a.lse) fill_slack(a.lse, a.q_used, -__builtin_inff());
}

}  // namespace sora::SORA_TIER
