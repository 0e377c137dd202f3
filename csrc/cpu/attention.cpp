// Attention over packed samples, forward.
//
// Everything is computed transposed: scores S^T [keys, queries] = K Q^T with queries on the vector lanes. So softmax runs down the
// lanes with no horizontal step.
//
// An item is up to kQueryBlock queries of one head, in panels of kPanel. For each block of kKeyBlock keys, K and V become operands
// once; then for each panel, with c = scale log2(e) and m the running maximum,
//
//   S^T = K Q^T      P = 2^(c S - m)      O^T = O^T 2^(m_old - m) + V^T P
//
// Blocks count from a sample's first token, so a sample's result does not depend on what it is packed with. Memory is per thread
// and does not grow with the sample.
#include "attention.h"

namespace sora::SORA_TIER {
namespace {

constexpr int kPanel = 64;                    // queries on the lanes of one panel
constexpr int kKeyBlock = kTiles ? 256 : 64;  // keys of one block of scores; tiles are faster in long sums

// A running maximum is raised only when it is this far behind, so that what was summed before rarely has to be scaled: numbers up
// to 2^8 lose no precision.
constexpr float kBehind = 8;

// One block of keys into the running softmax of NV vectors of queries: m and l are updated, P is put from column `column` on, and
// `correction` is the factor due to what was summed before. Returns whether any factor is not 1.
template <class M, int NV>
bool online_softmax(float* s, int num_keys, float log2_scale, float* m, float* l, float* correction, typename M::Right p,
                    int column) {
  vf highest[NV], total[NV];
#pragma GCC unroll 4
  for (int c = 0; c < NV; ++c) highest[c] = load(s + c * W);
  for (int j = 1; j < num_keys; ++j)
#pragma GCC unroll 4
    for (int c = 0; c < NV; ++c) highest[c] = max(highest[c], load(s + j * kPanel + c * W));
  vi changed = {};
#pragma GCC unroll 4
  for (int c = 0; c < NV; ++c) {
    const vf before = load(m + c * W), candidate = highest[c] * log2_scale;
    highest[c] = candidate > before + kBehind ? candidate : before;
    changed |= before != highest[c];
    store(m + c * W, highest[c]);
    highest[c] = highest[c] == -__builtin_inff() ? vf{} : highest[c];  // nothing seen yet: 2^(-inf - 0) is 0, not NaN
    const vf factor = exp2(before - highest[c]);
    store(correction + c * W, factor);
    total[c] = load(l + c * W) * factor;
  }
  if (num_keys % 2 != 0)
    for (int c = 0; c < NV; ++c) store(s + num_keys * kPanel + c * W, vf{} - __builtin_inff());
  int j = 0;
  for (; j < num_keys; j += 2, s += 2 * kPanel) {
#pragma GCC unroll 4
    for (int c = 0; c < NV; ++c) {
      const vf even = exp2<M::kRough>(multiply_add(load(s + c * W), log2_scale, -highest[c])),
               odd = exp2<M::kRough>(multiply_add(load(s + kPanel + c * W), log2_scale, -highest[c]));
      M::put_pair(p, j, column + c * W, even, odd);
      total[c] += even + odd;
    }
  }
  for (; j % M::kDepth != 0; j += 2)
    for (int c = 0; c < NV; ++c) M::put_pair(p, j, column + c * W, vf{}, vf{});
#pragma GCC unroll 4
  for (int c = 0; c < NV; ++c) store(l + c * W, total[c]);
  return any(changed);
}

template <class M, int NV = kTileVectors>
bool online_softmax_columns(int columns, float* s, int num_keys, float log2_scale, float* m, float* l, float* correction,
                            typename M::Right p, int column) {
  bool changed = false;
  for (; column + (NV - 1) * W < columns; column += NV * W)
    changed |= online_softmax<M, NV>(s + column, num_keys, log2_scale, m + column, l + column, correction + column, p, column);
  if constexpr (NV > 1)
    if (column < columns)
      changed |= online_softmax_columns<M, NV - 1>(columns, s, num_keys, log2_scale, m, l, correction, p, column);
  return changed;
}

constexpr int kPanels = kQueryBlock / kPanel;

// A thread's memory for an item.
template <class M>
struct Room {
  float *k, *v, *scores, *probabilities, *correction;
  struct {
    float *q, *out, *m, *l;
  } panel[kPanels];

  Room(Pieces& pieces, int d, int panels) {
    k = pieces.take(M::left_size(kKeyBlock, d)), v = pieces.take(M::left_size(d, kKeyBlock));
    scores = pieces.take(kKeyBlock * kPanel);
    probabilities = M::kInPlace ? scores : pieces.take(M::right_size(kKeyBlock, kPanel));
    correction = pieces.take(kPanel);
    for (int i = 0; i < panels; ++i) {
      panel[i].q = pieces.take(M::right_size(d, kPanel)), panel[i].out = pieces.take(padded(d) * kPanel);
      panel[i].m = pieces.take(kPanel), panel[i].l = pieces.take(kPanel);
    }
  }
};

template <class T, class Mask>
class Forward {
  using M = Multiplier<T>;
  struct Panel {
    int64_t begin;
    int count;
    float *out, *m, *l;
    typename M::Right q;
    bool seen = false;
    Mask mask;
  };

  const typename M::Session session_;
  const Attention& a_;
  const AttentionItem& item_;
  const Sample& s_;
  const int d_, head_k_, panels_;
  const ScoreTerms terms_;
  const Room<M> room_;
  Panel panel_[kPanels];

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
      begin = panel_[i].mask.k_begin < begin ? panel_[i].mask.k_begin : begin;
      end = panel_[i].mask.k_end > end ? panel_[i].mask.k_end : end;
    }
    for (int64_t block = begin / kKeyBlock * kKeyBlock; block < end; block += kKeyBlock) {
      const int num_keys = at_most(s_.k_size - block, kKeyBlock);
      bool packed = false;
      typename M::Left k_block, v_block;
      for (int i = 0; i < panels_; ++i) {
        // Of the block, the panel takes what its mask leaves, from a whole tile on.
        const BlockPart part(panel_[i].mask, block, num_keys);
        const Visible visible = part.count > 0 ? panel_[i].mask.visible(block + part.skipped, part.count) : Visible::kNone;
        if (visible == Visible::kNone) continue;
        if (!packed) {
          k_block = M::left(k[block], k.stride, num_keys, d_, room_.k);
          v_block = M::left_transposed(v[block], v.stride, num_keys, d_, room_.v);
          packed = true;
        }
        add_block(panel_[i], visible, block + part.skipped, part.count, M::from_row(k_block, part.skipped),
                  M::from_depth(v_block, part.skipped));
      }
    }
    finish();
  }

 private:
  void start() {
    const Rows<const T> q(a_.q, s_.q_batch, s_.q_start, item_.head);
    for (int i = 0; i < panels_; ++i) {
      Panel& p = panel_[i];
      p.begin = item_.q_begin + i * kPanel;
      p.count = at_most(item_.q_end - p.begin, kPanel);
      p.out = room_.panel[i].out, p.m = room_.panel[i].m, p.l = room_.panel[i].l;
      for (int c = 0; c < kPanel; ++c) p.m[c] = -__builtin_inff(), p.l[c] = 0;
      p.q = M::right_transposed(q[p.begin], q.stride, p.count, d_, room_.panel[i].q);
      p.mask.start(a_, s_, p.begin, p.count);
    }
  }

  void add_block(Panel& p, Visible visible, int64_t block, int num_keys, typename M::Left k, typename M::Left v) {
    float* scores = room_.scores;
    M::template multiply<Init::kZero>(num_keys, p.count, d_, k, p.q, scores, kPanel);
    if (terms_.any) terms_.apply(scores, kPanel, p.begin, p.count, block, num_keys, nullptr);
    if (visible == Visible::kSome) p.mask.apply(scores, kPanel, block, num_keys);
    const typename M::Right probabilities = M::right_room(room_.probabilities, num_keys, kPanel);
    const bool changed =
        online_softmax_columns<M>(p.count, scores, num_keys, terms_.log2_scale, p.m, p.l, room_.correction, probabilities, 0);
    if (!p.seen) {
      M::template multiply<Init::kZero>(d_, p.count, num_keys, v, probabilities, p.out, kPanel);
    } else {
      if (changed) scale_output(p);
      M::template multiply<Init::kAdd>(d_, p.count, num_keys, v, probabilities, p.out, kPanel);
    }
    p.seen = true;
  }

  void scale_output(const Panel& p) {
    for (int i = 0; i < d_; ++i)
      for (int c = 0; c < p.count; c += W) store(p.out + i * kPanel + c, load(p.out + i * kPanel + c) * load(room_.correction + c));
  }

  void finish() {
    const Rows<T> out(a_.out, s_.q_batch, s_.q_start, item_.head);
    double* lse = lse_row(a_.lse, s_, item_.head);
    for (int i = 0; i < panels_; ++i) {
      const Panel& p = panel_[i];
      if (!p.seen) memset(p.out, 0, d_ * kPanel * sizeof(float));
      for (int c = 0; c < p.count; ++c) {
        lse[p.begin + c] = p.m[c] * __builtin_log(2) + __builtin_log(p.l[c]);  // -inf if nothing was seen
        room_.correction[c] = p.l[c] == 0 ? 0 : 1 / p.l[c];
      }
      put_transposed(p.out, kPanel, room_.correction, out, p.begin, p.count, d_);
    }
  }
};

template <class T, class Mask>
void forward(const Attention& a) {
  parallel_for(a.num_items, [&](int64_t i) { Forward<T, Mask>(a, a.items[i]).run(); });
  zero_slack<T>(a.out, a.q_used);
  if (a.lse.ndim == 2)
    for (int64_t h = 0; h < a.lse.size[0]; ++h)
      for (int64_t n = a.q_used; n < a.lse.size[1]; ++n)
        static_cast<double*>(a.lse.data)[h * a.lse.stride[0] + n] = -__builtin_inf();
}

}  // namespace

void attention_forward(const Attention& a) {
  dispatch(a.q.dtype, [&](auto t) { a.windowed ? forward<decltype(t), GridMask>(a) : forward<decltype(t), BandMask>(a); });
}

}  // namespace sora::SORA_TIER
