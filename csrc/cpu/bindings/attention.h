// Attention: checks, samples and work items; packed and dense.
#pragma once

#include <omp.h>

#include <algorithm>
#include <array>
#include <vector>

#include "../../bindings/define.h"
#include "../kernels.h"

namespace sora {

struct AttentionCall : Attention {
  std::vector<Sample> sample_list;
  std::vector<AttentionItem> item_list;
};

inline int32_t heads(const Tensor& x) { return static_cast<int32_t>(x.size[x.ndim - 2]); }

// x[i] of a contiguous x.
inline Tensor part(const Tensor& x, int64_t i) {
  Tensor y = x;
  y.data = x.data == nullptr ? nullptr : static_cast<float*>(x.data) + i * x.stride[0], y.ndim = x.ndim - 1;
  std::copy_n(x.size + 1, y.ndim, y.size), std::copy_n(x.stride + 1, y.ndim, y.stride);
  return y;
}

inline void check_attention(AttentionCall& a, const Tensor& of_softmax, const Tensor& cu_q, const Tensor& cu_k) {
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
    float_table(of_softmax, {2, a.q.size[1], a.q.size[0]});
  } else {
    if (a.k.size[0] != a.q.size[0]) fail(a.k, "q's batch size " + std::to_string(a.q.size[0]), shape_of(a.k));
    float_table(of_softmax, {2, a.q.size[0], a.q.size[2], a.q.size[1]});
  }
  a.maximum = part(of_softmax, 0), a.sum = part(of_softmax, 1);
}

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

// Floats of dQ that a thread may hold for an item.
constexpr int64_t kMaxAccumulated = int64_t{1} << 20;
// Keys, or queries, of an item of a sample that is cut.
constexpr int64_t kBackwardBlock = 1024;
// What cutting a sample costs: seven products for five.
constexpr double kCutCost = 1.4;

// Keys become operands once per item, so items have as many queries as fit into a core's cache, but few enough for all threads.
// No result depends on where items are cut, as long as it is between panels of 64 queries.
inline int64_t queries_of_item(const AttentionCall& a) {
  int64_t queries = std::clamp<int64_t>((int64_t{1} << 17) / a.q.size[a.q.ndim - 1] / 64 * 64, 64, kQueryBlock);
  const auto items = [&] {
    int64_t count = 0;
    for (const Sample& s : a.sample_list) count += (s.q_size + queries - 1) / queries;
    return count * heads(a.q);
  };
  while (queries >= 128 && items() < 4 * omp_get_max_threads()) queries = queries / 128 * 64;
  return queries;
}

// Items for queries, or for keys, [begin, end) of a sample.
inline void add_items(AttentionCall& a, size_t sample, int32_t num_heads, bool keys, int64_t begin, int64_t end, int64_t step) {
  const Sample& s = a.sample_list[sample];
  const int32_t b = static_cast<int32_t>(sample);
  for (int32_t h = 0; h < num_heads; ++h)
    for (int64_t n = begin; n < end; n += step) {
      const int64_t last = std::min(n + step, end);
      if (keys)
        a.item_list.push_back({b, h, 0, s.q_size, n, last, false, true});
      else
        a.item_list.push_back({b, h, n, last, 0, s.k_size, true, false});
    }
}

inline void forward_items(AttentionCall& a) {
  const int64_t step = queries_of_item(a);
  for (size_t b = 0; b < a.sample_list.size(); ++b) add_items(a, b, heads(a.q), false, 0, a.sample_list[b].q_size, step);
}

// Items for dQ of some queries and for dK and dV of some keys.
inline void add_cut(AttentionCall& a, size_t sample, int64_t q_begin, int64_t q_end, int64_t k_begin, int64_t k_end) {
  add_items(a, sample, heads(a.k), true, k_begin, k_end, kBackwardBlock);
  add_items(a, sample, heads(a.k), false, q_begin, q_end, kBackwardBlock);
}

// The pairs of queries and keys that keep a thread busy as long as all the others.
inline double share_of_thread(const AttentionCall& a) {
  double total = 0;
  for (const Sample& s : a.sample_list) total += double(s.q_size) * s.k_size * heads(a.k);
  return kCutCost * total / omp_get_max_threads();
}

inline void add_backward_items(AttentionCall& a, size_t sample, double share) {
  const Sample& s = a.sample_list[sample];
  const int64_t head_dim = a.q.size[a.q.ndim - 1], group = heads(a.q) / std::max(heads(a.k), 1);
  if (s.q_size * group * head_dim > kMaxAccumulated || double(s.q_size) * s.k_size > share)
    add_cut(a, sample, 0, s.q_size, 0, s.k_size);
  // A sample without queries still owes its keys zero gradients, and one without keys its queries.
  else if (s.q_size + s.k_size > 0)
    for (int32_t h = 0; h < heads(a.k); ++h)
      a.item_list.push_back({static_cast<int32_t>(sample), h, 0, s.q_size, 0, s.k_size, true, true});
}

inline void backward_items(AttentionCall& a) {
  const double share = share_of_thread(a);
  for (size_t b = 0; b < a.sample_list.size(); ++b) add_backward_items(a, b, share);
}

// Longest first, so that no thread starts a long item when the others are done.
template <class Item>
void longest_first(std::vector<Item>& list, const Item*& items, int64_t& num_items) {
  std::stable_sort(list.begin(), list.end(), [](const Item& x, const Item& y) { return x.work() > y.work(); });
  items = list.data(), num_items = static_cast<int64_t>(list.size());
}

inline void run(AttentionCall& a, void (*kernel)(const Attention&)) {
  longest_first(a.item_list, a.items, a.num_items);
  kernel(a);
}

inline void add_gradients(AttentionCall& a, Tensor dout, Tensor dlse, Tensor dq, Tensor dk, Tensor dv) {
  a.dout = dout, a.dlse = dlse, a.dq = dq, a.dk = dk, a.dv = dv;
  same_storage({&a.q, &dout, &dq, &dk, &dv});
  same_shape(dout, a.q), same_shape(dq, a.q), same_shape(dk, a.k), same_shape(dv, a.k);
  if (dlse) same_shape(dlse, a.sum), dtype(dlse, DType::kFloat32), contiguous_rows(dlse);
}

inline AttentionCall attention_call(Tensor q, Tensor k, Tensor v, Tensor out, Tensor of_softmax, Tensor cu_q, Tensor cu_k,
                                    Tensor bias, Tensor alibi, float scale, int64_t left, int64_t right, float softcap) {
  constexpr int64_t kUnbounded = int64_t{1} << 60;  // more than there are tokens, and far from overflowing
  AttentionCall a{};
  a.q = q, a.k = k, a.v = v, a.out = out, a.bias = bias, a.alibi = alibi;
  a.scale = scale, a.softcap = softcap;
  a.left = std::clamp(left, -kUnbounded, kUnbounded), a.right = std::clamp(right, -kUnbounded, kUnbounded);
  check_attention(a, of_softmax, cu_q, cu_k);
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
             int64_t left, int64_t right, float softcap, Tensor out, Tensor lse, Tensor of_softmax) {
           AttentionCall a = attention_call(q, k, v, out, of_softmax, cu_q, cu_k, bias, alibi, scale, left, right, softcap);
           same_shape(lse, a.sum), dtype(lse, DType::kFloat32), contiguous(lse);
           a.lse = lse;
           call.run([&] {
             add_samples(a, cu_q, cu_k);
             forward_items(a);
             run(a, kernels->attention_forward);
           });
         });
  define(m,
         "attention_backward(dout, dlse?, q, k, v, out, statistics, cu_q?, cu_k?, bias?, alibi?, scale, left, right, softcap) -> "
         "dq, dk, dv",
         [=](const Call& call, Tensor dout, Tensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor of_softmax, Tensor cu_q,
             Tensor cu_k, Tensor bias, Tensor alibi, float scale, int64_t left, int64_t right, float softcap, Tensor dq, Tensor dk,
             Tensor dv) {
           AttentionCall a = attention_call(q, k, v, out, of_softmax, cu_q, cu_k, bias, alibi, scale, left, right, softcap);
           add_gradients(a, dout, dlse, dq, dk, dv);
           call.run([&] {
             add_samples(a, cu_q, cu_k);
             backward_items(a);
             run(a, kernels->attention_backward);
           });
         });
}

}  // namespace sora
