// Which keys a panel of queries sees: causal, sliding and full attention.
#pragma once

#include "attention.h"

namespace sora::SORA_TIER {

enum class Visible { kNone, kSome, kAll };

// Query i sees keys i + diagonal - left .. i + diagonal + right. Queries are on the vector lanes.
struct BandMask {
  int64_t k_begin, k_end;        // keys outside are seen by no query of the panel
  int64_t q_begin, first, last;  // the first query's lowest key and highest key
  int count;

  void start(const Attention& a, const Sample& s, int64_t q_begin_, int count_) {
    const int64_t diagonal = s.k_size - s.q_size;
    q_begin = q_begin_, count = count_;
    first = q_begin + diagonal - a.left, last = q_begin + diagonal + a.right;
    k_begin = first < 0 ? 0 : first < s.k_size ? first : s.k_size;
    k_end = last + count < s.k_size ? last + count : s.k_size;
    if (k_end < k_begin) k_end = k_begin;
  }

  // Whether a block of keys is seen by none, some or all of the panel's queries.
  Visible visible(int64_t k, int num_keys) const {
    if (k >= k_end || k + num_keys <= k_begin) return Visible::kNone;
    return first + count - 1 <= k && k + num_keys - 1 <= last ? Visible::kAll : Visible::kSome;
  }

  // Sets the scores of unseen pairs in [num_keys, ld] to -inf.
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

// The keys of a block between the first and the last that a panel sees: `count` after `skipped`, both whole tiles, or the block
// ends.
struct BlockPart {
  int skipped, count;
  BlockPart(const BandMask& mask, int64_t block, int num_keys)
      : skipped(mask.k_begin > block ? at_most(mask.k_begin - block, num_keys) / 32 * 32 : 0),
        count(at_most((mask.k_end - block + 31) / 32 * 32, num_keys) - skipped) {}
};

}  // namespace sora::SORA_TIER
