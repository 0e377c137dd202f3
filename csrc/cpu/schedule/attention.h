// Attention: how the work of a call is cut into items for threads.
//
// Cost model: an item costs as many units as it has pairs of a query and a key.
//
// Forward, an item is up to kQueryBlock queries of one head. Its keys become operands once, so longer items do less work. Shorter
// ones keep all threads busy.
//
// Backward, an item is a whole sample of one key head, whose pairs take five matrix products. A sample is cut if it has more pairs
// than a thread's share of the call's. It is cut, too, if its dQ is too large for one thread to accumulate. Then some items compute
// dK and dV, and others dQ. Both need the probabilities, so a pair takes seven products: kCutCost is 7 / 5.
//
// No result depends on where items are cut, as long as it is between panels of 64 queries.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../kernels.h"

namespace sora {

// A call with the lists that its pointers point into.
struct AttentionCall : Attention {
  std::vector<Sample> sample_list;
  std::vector<AttentionItem> item_list;
};

inline int32_t heads(const Tensor& x) { return static_cast<int32_t>(x.size[x.ndim - 2]); }

constexpr int64_t kMaxAccumulated = int64_t{1} << 20;  // floats of dQ that a thread accumulates, at most
constexpr int64_t kBackwardBlock = 1024;               // keys, or queries, of an item of a sample that is cut
constexpr double kCutCost = 1.4;

// Queries of a forward item: as many as fit into a core's cache, but few enough for all threads.
inline int64_t queries_per_item(const AttentionCall& a) {
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

inline void schedule_forward(AttentionCall& a) {
  const int64_t step = queries_per_item(a);
  for (size_t b = 0; b < a.sample_list.size(); ++b) add_items(a, b, heads(a.q), false, 0, a.sample_list[b].q_size, step);
}

// A cut sample's items for dQ of some queries, and for dK and dV of some keys.
inline void add_cut_items(AttentionCall& a, size_t sample, int64_t q_begin, int64_t q_end, int64_t k_begin, int64_t k_end) {
  add_items(a, sample, heads(a.k), true, k_begin, k_end, kBackwardBlock);
  add_items(a, sample, heads(a.k), false, q_begin, q_end, kBackwardBlock);
}

// The most pairs that an item of a whole sample may have: more would keep its thread busy for longer than all the others.
inline double pairs_per_thread(const AttentionCall& a) {
  double total = 0;
  for (const Sample& s : a.sample_list) total += double(s.q_size) * s.k_size * heads(a.k);
  return kCutCost * total / omp_get_max_threads();
}

inline void add_backward_items(AttentionCall& a, size_t sample, double max_pairs) {
  const Sample& s = a.sample_list[sample];
  const int64_t head_dim = a.q.size[a.q.ndim - 1], group = heads(a.q) / std::max(heads(a.k), 1);
  if (s.q_size * group * head_dim > kMaxAccumulated || double(s.q_size) * s.k_size > max_pairs)
    add_cut_items(a, sample, 0, s.q_size, 0, s.k_size);
  // A sample without queries still owes its keys zero gradients, and one without keys its queries.
  else if (s.q_size + s.k_size > 0)
    for (int32_t h = 0; h < heads(a.k); ++h)
      a.item_list.push_back({static_cast<int32_t>(sample), h, 0, s.q_size, 0, s.k_size, true, true});
}

inline void schedule_backward(AttentionCall& a) {
  const double max_pairs = pairs_per_thread(a);
  for (size_t b = 0; b < a.sample_list.size(); ++b) add_backward_items(a, b, max_pairs);
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

}  // namespace sora
