// Attention over packed samples, forward.
//
// An item is up to kQueryBlock queries of one head, in panels of kPanel. For each block of kKeyBlock keys, K and V become operands
// once, and then every panel adds them to its running softmax: see softmax.h.
//
// Blocks count from a sample's first token, so a sample's result does not depend on what it is packed with. Memory is per thread
// and does not grow with the sample.
#include "mask.h"
#include "softmax.h"

namespace sora::SORA_TIER {
namespace {

constexpr int kPanels = kQueryBlock / kPanel;

// A thread's memory for an item.
template <class M>
struct Room {
  float *k, *v;
  ScoreRoom<M> block;
  QueryPanel<M> panel[kPanels];

  Room(Pieces& pieces, int d, int panels)
      : k(pieces.take(M::left_size(kKeyBlock, d))), v(pieces.take(M::left_size(d, kKeyBlock))), block(pieces) {
    for (int i = 0; i < panels; ++i) panel[i].take_room(pieces, d);
  }
};

template <class T>
class Forward {
  using M = Multiplier<T>;

  const typename M::Session session_;
  const Attention& a_;
  const AttentionItem& item_;
  const Sample& s_;
  const int d_, head_k_, panels_;
  const ScoreTerms terms_;
  Room<M> room_;
  BandMask mask_[kPanels];

 public:
  Forward(const Attention& a, const AttentionItem& item)
      : a_(a),
        item_(item),
        s_(a.samples[item.sample]),
        d_(head_dim(a.q)),
        head_k_(item.head / (heads(a.q) / heads(a.k))),
        panels_(static_cast<int>((item.q_end - item.q_begin + kPanel - 1) / kPanel)),
        terms_(a, s_, item.head),
        room_(on_scratch<Room<M>>(d_, panels_)) {}

  void run() {
    start();
    const Rows<const T> k(a_.k, s_.k_batch, s_.k_start, head_k_), v(a_.v, s_.k_batch, s_.k_start, head_k_);
    int64_t begin = s_.k_size, end = 0;
    for (int i = 0; i < panels_; ++i) {
      begin = mask_[i].k_begin < begin ? mask_[i].k_begin : begin;
      end = mask_[i].k_end > end ? mask_[i].k_end : end;
    }
    for (int64_t block = begin / kKeyBlock * kKeyBlock; block < end; block += kKeyBlock) {
      const int num_keys = at_most(s_.k_size - block, kKeyBlock);
      bool packed = false;
      typename M::Left k_block, v_block;
      for (int i = 0; i < panels_; ++i) {
        // Of the block, the panel takes what its mask leaves, from a whole tile on.
        const BlockPart part(mask_[i], block, num_keys);
        const Visible visible = part.count > 0 ? mask_[i].visible(block + part.skipped, part.count) : Visible::kNone;
        if (visible == Visible::kNone) continue;
        if (!packed) {
          k_block = M::left(k[block], k.stride, num_keys, d_, room_.k);
          v_block = M::left_transposed(v[block], v.stride, num_keys, d_, room_.v);
          packed = true;
        }
        add_block(i, visible, block + part.skipped, part.count, M::from_row(k_block, part.skipped),
                  M::from_depth(v_block, part.skipped));
      }
    }
    finish();
  }

 private:
  int64_t query(int panel) const { return item_.q_begin + panel * kPanel; }
  int count(int panel) const { return at_most(item_.q_end - query(panel), kPanel); }

  void start() {
    const Rows<const T> q(a_.q, s_.q_batch, s_.q_start, item_.head);
    for (int i = 0; i < panels_; ++i) {
      room_.panel[i].start(q[query(i)], q.stride, count(i), d_);
      mask_[i].start(a_, s_, query(i), count(i));
    }
  }

  void add_block(int i, Visible visible, int64_t block, int num_keys, typename M::Left k, typename M::Left v) {
    const KeyPart<M> keys{k, v, num_keys};
    room_.panel[i].add(0, count(i), d_, &keys, 1, terms_.log2_scale, room_.block, [&](float* scores) {
      if (terms_.any) terms_.apply(scores, kPanel, query(i), count(i), block, num_keys, nullptr);
      if (visible == Visible::kSome) mask_[i].apply(scores, kPanel, block, num_keys);
    });
  }

  void finish() {
    const Rows<T> out(a_.out, s_.q_batch, s_.q_start, item_.head);
    float *maximum = query_row(a_.maximum, s_, item_.head), *sum = query_row(a_.sum, s_, item_.head);
    float* lse = a_.lse ? query_row(a_.lse, s_, item_.head) : nullptr;
    for (int i = 0; i < panels_; ++i)
      room_.panel[i].finish(
          count(i), d_, room_.block, [&](int c) { return out[query(i) + c]; },
          [&](int c, float m, float l) {
            const int64_t n = query(i) + c;
            maximum[n] = m, sum[n] = l;
            if (lse != nullptr) lse[n] = log_sum(m, l, terms_.unit);
          });
  }
};

template <class T>
void forward(const Attention& a) {
  parallel_for(a.num_items, [&](int64_t i) { Forward<T>(a, a.items[i]).run(); });
  zero_query_slack<T>(a);
}

}  // namespace

void attention_forward(const Attention& a) {
  dispatch(a.q.dtype, [&](auto t) { forward<decltype(t)>(a); });
}

}  // namespace sora::SORA_TIER
