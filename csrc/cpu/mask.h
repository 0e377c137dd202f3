// Which keys a panel of queries sees. Queries are on the vector lanes; both masks answer for one panel:
//
//   start(a, s, q_begin, count)    the panel
//   k_begin, k_end                 keys outside are seen by no query of the panel
//   visible(k_begin, num_keys)     whether a block of keys is seen by none, some or all of its queries
//   apply(scores, ...)             sets the scores of unseen pairs in [num_keys, ld] to -inf
#pragma once

#include "simd.h"

namespace sora::SORA_TIER {

enum class Visible { kNone, kSome, kAll };

// Query i sees keys i + diagonal - left .. i + diagonal + right: causal, sliding and full attention.
struct BandMask {
  int64_t k_begin, k_end, q_begin, first, last;  // the first query's lowest key and highest key
  int count;

  void start(const Attention& a, const Sample& s, int64_t q_begin_, int count_) {
    const int64_t diagonal = s.k_size - s.q_size;
    q_begin = q_begin_, count = count_;
    first = q_begin + diagonal - a.left, last = q_begin + diagonal + a.right;
    k_begin = first < 0 ? 0 : first;
    k_end = last + count < s.k_size ? last + count : s.k_size;
    if (k_end < k_begin) k_end = k_begin;
  }

  Visible visible(int64_t k, int num_keys) const {
    if (k >= k_end || k + num_keys <= k_begin) return Visible::kNone;
    return first + count - 1 <= k && k + num_keys - 1 <= last ? Visible::kAll : Visible::kSome;
  }

  void apply(float* scores, int ld, int64_t k, int num_keys) const {
    for (int j = 0; j < num_keys; ++j)
      for (int c = 0; c < count; c += W) {
        // Lane i is query q_begin + c + i: seen if first + c + i <= k + j <= last + c + i. Clamped, as a side may be unbounded.
        const vi low = lanes() + clamp(first + c - k - j), high = lanes() + clamp(last + c - k - j);
        float* p = scores + j * ld + c;
        store(p, (low <= 0) & (high >= 0) ? load(p) : vf{} - __builtin_inff());
      }
  }

 private:
  static int32_t clamp(int64_t x) {
    const int64_t limit = 1 << 29;
    return static_cast<int32_t>(x < -limit ? -limit : x > limit ? limit : x);
  }
};

// Inside a span a query sees a box of its (T, H, W) grid; in other spans of its sample everything; in a span of step 0 everything.
struct GridMask {
  static constexpr int kMaxCount = 128;
  int64_t k_begin, k_end;
  int count;
  const Attention* a;
  const Sample* s;
  // Per query: its span and the box it sees, [low, high) per axis.
  int32_t span[kMaxCount], low[3][kMaxCount], high[3][kMaxCount];
  // Of the whole panel: its span if it is only one, and the box that holds all its boxes and the one that all of them hold.
  bool one_span;
  int32_t union_low[3], union_high[3], shared_low[3], shared_high[3];

  // The span and grid index of a token of the sample.
  struct Place {
    int32_t span, index[3];
  };
  Place place(int64_t token) const {
    const int64_t n = s->k_start + token;
    int32_t i = s->first_span;
    while (n >= a->cu_spans.ints()[i + 1]) ++i;
    const int32_t* size = a->grid.ints() + 3 * i;
    const int32_t offset = static_cast<int32_t>(n - a->cu_spans.ints()[i]);
    return {i, {offset / (size[1] * size[2]), offset / size[2] % size[1], offset % size[2]}};
  }

  void start(const Attention& attention, const Sample& sample, int64_t q_begin, int count_) {
    a = &attention, s = &sample, count = count_;
    k_begin = 0, k_end = sample.k_size;
    one_span = true;
    for (int i = 0; i < count || i % W != 0; ++i) {
      const Place q = place(q_begin + (i < count ? i : count - 1));
      const float* step = static_cast<const float*>(a->step.data) + 3 * q.span;
      const bool free = step[0] == 0 && step[1] == 0 && step[2] == 0;
      span[i] = q.span;
      one_span &= q.span == span[0];
      for (int axis = 0; axis < 3; ++axis) {
        const int32_t size = a->grid.ints()[3 * q.span + axis], x = q.index[axis];
        const int32_t window = a->window[axis] == 0 || a->window[axis] > size ? size : a->window[axis];
        int32_t lo = x - window / 2, hi;
        lo = lo < 0 ? 0 : lo > size - window ? size - window : lo;
        hi = lo + window;
        if (a->causal[axis]) lo = x - window + 1 < 0 ? 0 : x - window + 1, hi = x + 1;
        if (free) lo = 0, hi = size;
        low[axis][i] = lo, high[axis][i] = hi;
        if (i == 0) {
          union_low[axis] = shared_low[axis] = lo, union_high[axis] = shared_high[axis] = hi;
        } else {
          union_low[axis] = lo < union_low[axis] ? lo : union_low[axis];
          union_high[axis] = hi > union_high[axis] ? hi : union_high[axis];
          shared_low[axis] = lo > shared_low[axis] ? lo : shared_low[axis];
          shared_high[axis] = hi < shared_high[axis] ? hi : shared_high[axis];
        }
      }
    }
  }

  Visible visible(int64_t k, int num_keys) const {
    const Place first = place(k), last = place(k + num_keys - 1);
    if (!one_span) return Visible::kSome;
    if (last.span < span[0] || first.span > span[0]) return Visible::kAll;
    if (first.span != last.span) return Visible::kSome;
    // The block's box: an axis spans its whole size once a slower axis changes.
    Visible result = Visible::kAll;
    bool whole = false;
    for (int axis = 0; axis < 3; ++axis) {
      const int32_t lo = whole ? 0 : first.index[axis];
      const int32_t hi = whole ? a->grid.ints()[3 * span[0] + axis] : last.index[axis] + 1;
      if (hi <= union_low[axis] || lo >= union_high[axis]) return Visible::kNone;
      if (lo < shared_low[axis] || hi > shared_high[axis]) result = Visible::kSome;
      whole |= hi - lo > 1;
    }
    return result;
  }

  void apply(float* scores, int ld, int64_t k, int num_keys) const {
    Place key = place(k);
    for (int j = 0; j < num_keys; ++j) {
      for (int c = 0; c < count; c += W) {
        vi seen = load_ints(span + c) != key.span;
        vi inside = ~vi{};
        for (int axis = 0; axis < 3; ++axis)
          inside &= (load_ints(low[axis] + c) <= key.index[axis]) & (load_ints(high[axis] + c) > key.index[axis]);
        float* p = scores + j * ld + c;
        store(p, (seen | inside) != 0 ? load(p) : vf{} - __builtin_inff());
      }
      if (j + 1 < num_keys) advance(key, k + j + 1);
    }
  }

 private:
  static vi load_ints(const int32_t* p) {
    vi x;
    memcpy(&x, p, sizeof x);
    return x;
  }

  void advance(Place& key, int64_t token) const {
    const int32_t* size = a->grid.ints() + 3 * key.span;
    if (++key.index[2] < size[2]) return;
    key.index[2] = 0;
    if (++key.index[1] < size[1]) return;
    key.index[1] = 0;
    if (++key.index[0] < size[0]) return;
    key = place(token);
  }
};

}  // namespace sora::SORA_TIER
