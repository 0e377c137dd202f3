// Attention: decodes and checks the arguments, packed or dense.
#pragma once

#include "../cpu/schedule/attention.h"
#include "define.h"

namespace sora {

// x[i] of a contiguous x.
inline Tensor part(const Tensor& x, int64_t i) {
  Tensor y = x;
  y.data = x.data == nullptr ? nullptr : static_cast<float*>(x.data) + i * x.stride[0], y.ndim = x.ndim - 1;
  std::copy_n(x.size + 1, y.ndim, y.size), std::copy_n(x.stride + 1, y.ndim, y.stride);
  return y;
}

inline void check_attention(AttentionCall& a, const Tensor& statistics, const Tensor& cu_q, const Tensor& cu_k) {
  same_storage({&a.q, &a.k, &a.v, &a.out});
  same_shape(a.out, a.q);
  same_shape(a.v, a.k);
  const int n = a.q.ndim;
  if (cu_q)
    rank(a.q, 3, "[N, H, d], as there are boundaries");
  else
    rank(a.q, 4, "[B, S, H, d], as there are no boundaries");
  rank(a.k, n, n == 3 ? "[Nk, Hk, d]" : "[B, Sk, Hk, d]");
  if (a.k.size[n - 1] != a.q.size[n - 1]) fail(a.k, "q's head dim " + std::to_string(a.q.size[n - 1]), shape_of(a.k));
  if (a.q.size[n - 1] < 1) fail(a.q, "a head dim of at least 1", shape_of(a.q));
  at_most(a.q, n - 1, kMaxProduct), at_most(a.q, n - 2);
  if ((a.k.size[n - 2] > 0 ? a.q.size[n - 2] % a.k.size[n - 2] : a.q.size[n - 2]) != 0)
    fail(a.k, "a head count that divides q's " + std::to_string(a.q.size[n - 2]), shape_of(a.k));
  if (cu_q) {
    if (!cu_k) fail(cu_k, "a tensor, as q has boundaries", "None");
    boundaries(cu_q, a.q.size[0]);
    boundaries(cu_k, a.k.size[0]);
    same_shape(cu_k, cu_q);
    float_table(statistics, {2, a.q.size[1], a.q.size[0]});
  } else {
    if (a.k.size[0] != a.q.size[0]) fail(a.k, "q's batch size " + std::to_string(a.q.size[0]), shape_of(a.k));
    float_table(statistics, {2, a.q.size[0], a.q.size[2], a.q.size[1]});
  }
  a.maximum = part(statistics, 0), a.sum = part(statistics, 1);
}

// The samples of a call, in the boundaries or along the batch axis.
inline void add_samples(AttentionCall& a, const Tensor& cu_q, const Tensor& cu_k) {
  if (cu_q) {
    const int32_t *q = cu_q.ints(), *k = cu_k.ints();
    for (int64_t b = 0; b + 1 < cu_q.size[0]; ++b) a.sample_list.push_back({q[b], k[b], 0, 0, q[b + 1] - q[b], k[b + 1] - k[b]});
    a.q_used = q[cu_q.size[0] - 1], a.k_used = k[cu_q.size[0] - 1];
  } else {
    for (int64_t b = 0; b < a.q.size[0]; ++b) a.sample_list.push_back({0, 0, b, b, a.q.size[1], a.k.size[1]});
    a.q_used = a.k_used = 0;
  }
  a.samples = a.sample_list.data();
}

inline void add_gradients(AttentionCall& a, Tensor dout, Tensor dlse, Tensor dq, Tensor dk, Tensor dv) {
  a.dout = dout, a.dlse = dlse, a.dq = dq, a.dk = dk, a.dv = dv;
  same_storage({&a.q, &dout, &dq, &dk, &dv});
  same_shape(dout, a.q), same_shape(dq, a.q), same_shape(dk, a.k), same_shape(dv, a.k);
  if (dlse) same_shape(dlse, a.sum), dtype(dlse, DType::kFloat32), contiguous_rows(dlse);
}

inline AttentionCall attention_call(Tensor q, Tensor k, Tensor v, Tensor out, Tensor statistics, Tensor cu_q, Tensor cu_k,
                                    Tensor bias, Tensor alibi, float scale, int64_t left, int64_t right, float softcap) {
  constexpr int64_t kUnbounded = int64_t{1} << 60;  // more than there are tokens, and far from overflowing
  AttentionCall a{};
  a.q = q, a.k = k, a.v = v, a.out = out, a.bias = bias, a.alibi = alibi;
  a.scale = scale, a.softcap = softcap;
  a.left = std::clamp(left, -kUnbounded, kUnbounded), a.right = std::clamp(right, -kUnbounded, kUnbounded);
  check_attention(a, statistics, cu_q, cu_k);
  const int64_t batch = cu_q ? cu_q.size[0] - 1 : q.size[0], num_heads = q.size[q.ndim - 2];
  if (bias) {
    if (cu_q) fail(bias, "None, as there are boundaries", "a tensor");
    shape(bias, {batch, num_heads, q.size[1], k.size[1]});
    dtype(bias, DType::kFloat32);
  }
  if (alibi) shape(alibi, {batch, num_heads}), dtype(alibi, DType::kFloat32);
  return a;
}

inline void bind_attention(py::module_& m, const Kernels* kernels) {
  define(m, "attention_forward(q, k, v, cu_q?, cu_k?, bias?, alibi?, scale, left, right, softcap) -> out, lse, statistics",
         [=](const Call& call, Tensor q, Tensor k, Tensor v, Tensor cu_q, Tensor cu_k, Tensor bias, Tensor alibi, float scale,
             int64_t left, int64_t right, float softcap, Tensor out, Tensor lse, Tensor statistics) {
           AttentionCall a = attention_call(q, k, v, out, statistics, cu_q, cu_k, bias, alibi, scale, left, right, softcap);
           same_shape(lse, a.sum), dtype(lse, DType::kFloat32), contiguous(lse);
           a.lse = lse;
           call.run([&] {
             add_samples(a, cu_q, cu_k);
             schedule_forward(a);
             run(a, kernels->attention_forward);
           });
         });
  define(m,
         "attention_backward(dout, dlse?, q, k, v, out, statistics, cu_q?, cu_k?, bias?, alibi?, scale, left, right, softcap) -> "
         "dq, dk, dv",
         [=](const Call& call, Tensor dout, Tensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor statistics, Tensor cu_q,
             Tensor cu_k, Tensor bias, Tensor alibi, float scale, int64_t left, int64_t right, float softcap, Tensor dq, Tensor dk,
             Tensor dv) {
           AttentionCall a = attention_call(q, k, v, out, statistics, cu_q, cu_k, bias, alibi, scale, left, right, softcap);
           add_gradients(a, dout, dlse, dq, dk, dv);
           call.run([&] {
             add_samples(a, cu_q, cu_k);
             schedule_backward(a);
             run(a, kernels->attention_backward);
           });
         });
}

}  // namespace sora
