// Attention over packed samples, backward.
//
// For each block of keys and panel of queries, P is computed again from the rows' maximum and sum; dP^T = V dO^T; dS = P (dP -
// delta); dV += P dO; dK += dS Q; dQ^T += K^T dS.
//
// An item is one key head of a sample with all its query heads: nothing is shared between items, so there are no atomics, and five
// products do. dQ is summed in float32 over the whole sample, which takes memory; a sample that would take too much, or that alone
// would keep one thread busy when the others are done, is cut into items that compute dQ of some queries, and others that compute
// dK and dV of some keys. They take seven products. Either way a sum's order is the same, and so are its bits.
#include "mask.h"

namespace sora::SORA_TIER {
namespace {

constexpr int kPanel = kTiles ? 128 : 64;               // queries on the lanes of one panel
constexpr int kKeyBlock = kTiles || kPairs ? 128 : 64;  // keys of one block of scores

// Blocks of keys whose operands and sums are kept while all queries pass: at most, and so that they fit into a core's cache.
constexpr int kKeyBlocks = 8;
constexpr int kKeptElements = 1 << 16;

struct PanelStatistics {
  float maximum[kPanel], inverse[kPanel], delta[kPanel], dlse[kPanel];
};

template <class T>
void panel_statistics(const Attention& a, const Sample& s, int head, int64_t begin, int count, PanelStatistics& to) {
  const Rows<const T> out(a.out, s.q_batch, s.q_start, head), dout(a.dout, s.q_batch, s.q_start, head);
  const float *maximum = query_row(a.maximum, s, head) + begin, *sum = query_row(a.sum, s, head) + begin;
  const float* dlse = a.dlse ? query_row(a.dlse, s, head) + begin : nullptr;
  for (int c = 0; c < kPanel; ++c) {
    const QueryStatistics q =
        c < count ? QueryStatistics(maximum[c], sum[c], out[begin + c], dout[begin + c], head_dim(a.q)) : QueryStatistics();
    to.maximum[c] = q.maximum, to.inverse[c] = q.inverse, to.delta[c] = q.delta;
    to.dlse[c] = q.inverse != 0 && dlse ? dlse[c] : 0;
  }
}

// Scores and dP [num_keys, kPanel] -> P and dS = P (dP - delta + dlse), as the operands that the products want. Where the block is
// all that the panel sees, delta is taken as sum_j P dP, from the very numbers it is subtracted from: dP - delta of a query with a
// single key is exactly 0. dlse is added behind that: taken from delta first, its rounding would be left where dP - delta is 0.
template <class M>
struct Gradients {
  typename M::Left p, ds;
  typename M::Right ds_right;

  void compute(float* scores, float* dp, const float* slopes, float log2_scale, int num_keys, int count, const PanelStatistics& row,
               bool whole) {
    complete_pairs(scores, dp, num_keys, kPanel, 0, kPanel);
    for (int c = 0; c < count; c += 2 * W) {
      vf maximum[2], inverse[2], delta[2], dlse[2];
      for (int n = 0; n < 2; ++n) {
        maximum[n] = load(row.maximum + c + n * W), inverse[n] = load(row.inverse + c + n * W);
        delta[n] = load(row.delta + c + n * W), dlse[n] = load(row.dlse + c + n * W);
        if (whole) {
          delta[n] = vf{};
          for (int at = c + n * W; at < num_keys * kPanel; at += kPanel)
            delta[n] += exp2<M::kRough>((load(scores + at) - maximum[n]) * log2_scale) * inverse[n] * load(dp + at);
        }
      }
      int j = 0;
      for (; j < num_keys; j += 2) {
        vf probability[2][2], gradient[2][2];
#pragma GCC unroll 2
        for (int m = 0; m < 2; ++m)
#pragma GCC unroll 2
          for (int n = 0; n < 2; ++n) {
            const int at = (j + m) * kPanel + c + n * W;
            probability[m][n] = exp2<M::kRough>((load(scores + at) - maximum[n]) * log2_scale) * inverse[n];
            gradient[m][n] = probability[m][n] * (load(dp + at) - delta[n] + dlse[n]);
            if (slopes != nullptr) gradient[m][n] *= load(slopes + at);
          }
        put(j, c, probability, gradient);
      }
      const vf zero[2][2] = {};
      for (; j % M::kDepth != 0; j += 2) put(j, c, zero, zero);
    }
  }

 private:
  SORA_INLINE void put(int j, int c, const vf (&probability)[2][2], const vf (&gradient)[2][2]) {
    for (int m = 0; m < 2; ++m) {
      M::put_row(p, j + m, c, probability[m][0], probability[m][1]);
      M::put_row(ds, j + m, c, gradient[m][0], gradient[m][1]);
    }
    if constexpr (!M::kInPlace)
      for (int n = 0; n < 2; ++n) M::put_pair(ds_right, j, c + n * W, gradient[0][n], gradient[1][n]);
  }
};

// A thread's memory for an item: operands of the kept blocks of keys and of one panel of queries, sums, and one block of scores.
template <class M>
struct Room {
  struct {
    float *k, *k_transposed, *v, *dk, *dv;
  } key[kKeyBlocks];
  float *q, *q_transposed, *dout, *dout_transposed;
  float *scores, *dp, *slopes;
  float *p, *ds, *ds_right;
  float *dq, *scale;

  Room(Pieces& pieces, int d, int key_blocks, int64_t dq_panels) {
    const int64_t keys_left = M::left_size(kKeyBlock, d), queries_right = M::right_size(kPanel, d);
    for (int i = 0; i < key_blocks; ++i) {
      key[i].k = pieces.take(keys_left), key[i].v = pieces.take(keys_left);
      key[i].k_transposed = pieces.take(M::left_size(d, kKeyBlock));
      key[i].dk = pieces.take(kKeyBlock * padded(d)), key[i].dv = pieces.take(kKeyBlock * padded(d));
    }
    q = pieces.take(queries_right), dout = pieces.take(queries_right);
    q_transposed = pieces.take(M::right_size(d, kPanel)), dout_transposed = pieces.take(M::right_size(d, kPanel));
    scores = pieces.take(kKeyBlock * kPanel), dp = pieces.take(kKeyBlock * kPanel), slopes = pieces.take(kKeyBlock * kPanel);
    p = M::kInPlace ? scores : pieces.take(M::left_size(kKeyBlock, kPanel));
    ds = M::kInPlace ? dp : pieces.take(M::left_size(kKeyBlock, kPanel));
    ds_right = M::kInPlace ? dp : pieces.take(M::right_size(kKeyBlock, kPanel));
    dq = pieces.take(dq_panels * padded(d) * kPanel), scale = pieces.take(kPanel);
  }
};

template <class T>
class Backward {
  using M = Multiplier<T>;
  const typename M::Session session_;
  const Attention& a_;
  const AttentionItem& item_;
  const Sample& s_;
  const int d_, width_, group_;
  const int panels_;    // of one query head
  const int64_t kept_;  // keys
  const Room<M> room_;
  typename M::Left k_[kKeyBlocks], k_transposed_[kKeyBlocks], v_[kKeyBlocks];

 public:
  Backward(const Attention& a, const AttentionItem& item)
      : a_(a),
        item_(item),
        s_(a.samples[item.sample]),
        d_(head_dim(a.q)),
        width_(static_cast<int>(padded(d_))),
        group_(heads(a.q) / heads(a.k)),
        panels_(static_cast<int>((item.q_end - item.q_begin + kPanel - 1) / kPanel)),
        kept_(kKeyBlock * clamp(kKeptElements / (kKeyBlock * width_), 1, kKeyBlocks)),
        room_(on_scratch<Room<M>>(d_, static_cast<int>(kept_ / kKeyBlock), item.queries ? int64_t{group_} * panels_ : 0)) {}

  void run() {
    const int64_t tile = int64_t{width_} * kPanel;
    if (item_.queries) memset(room_.dq, 0, group_ * panels_ * tile * sizeof(float));
    for (int64_t begin = item_.k_begin; begin < item_.k_end; begin += kept_) {
      const int64_t end = begin + (item_.k_end - begin < kept_ ? item_.k_end - begin : kept_);
      start_keys(begin, end);
      for (int g = 0; g < group_; ++g)
        for (int i = 0; i < panels_; ++i) add_panel(item_.head * group_ + g, i, begin, end, room_.dq + (g * panels_ + i) * tile);
      if (item_.keys) finish_keys(begin, end);
    }
    if (item_.queries) finish_queries(tile);
  }

 private:
  void start_keys(int64_t begin, int64_t end) {
    const Rows<const T> k(a_.k, s_.k_batch, s_.k_start, item_.head), v(a_.v, s_.k_batch, s_.k_start, item_.head);
    for (int b = 0; begin < end; ++b, begin += kKeyBlock) {
      const int num_keys = at_most(end - begin, kKeyBlock);
      const auto& room = room_.key[b];
      k_[b] = M::left(k[begin], k.stride, num_keys, d_, room.k);
      v_[b] = M::left(v[begin], v.stride, num_keys, d_, room.v);
      if (item_.queries) k_transposed_[b] = M::left_transposed(k[begin], k.stride, num_keys, d_, room.k_transposed);
      memset(room.dk, 0, kKeyBlock * width_ * sizeof(float));
      memset(room.dv, 0, kKeyBlock * width_ * sizeof(float));
    }
  }

  // Everything that panel i of a query head has to do with keys [k_begin, k_end).
  void add_panel(int head, int i, int64_t k_begin, int64_t k_end, float* dq) {
    const int64_t begin = item_.q_begin + int64_t{i} * kPanel;
    const int count = at_most(item_.q_end - begin, kPanel);
    BandMask mask;
    mask.start(a_, s_, begin, count);
    if (mask.k_end <= k_begin || mask.k_begin >= k_end) return;
    // One block of these keys is all that the panel sees. An item may hold only some of them, such as those of one span.
    const bool whole = mask.k_begin >= k_begin && mask.k_end <= k_end &&
                       (mask.k_begin - k_begin) / kKeyBlock == (mask.k_end - 1 - k_begin) / kKeyBlock;
    const Rows<const T> q(a_.q, s_.q_batch, s_.q_start, head), dout(a_.dout, s_.q_batch, s_.q_start, head);
    const ScoreTerms terms(a_, s_, head);
    const typename M::Right q_transposed = M::right_transposed(q[begin], q.stride, count, d_, room_.q_transposed);
    const typename M::Right dout_transposed = M::right_transposed(dout[begin], dout.stride, count, d_, room_.dout_transposed);
    typename M::Right q_rows{}, dout_rows{};
    if (item_.keys) {
      q_rows = M::right(q[begin], q.stride, count, d_, room_.q);
      dout_rows = M::right(dout[begin], dout.stride, count, d_, room_.dout);
    }
    PanelStatistics statistics;
    panel_statistics<T>(a_, s_, head, begin, count, statistics);

    float *scores = room_.scores, *dp = room_.dp;
    // What is not computed, a panel's last columns and slopes of a last odd key, must be finite, as it is multiplied by zero.
    constexpr size_t kBlockBytes = kKeyBlock * kPanel * sizeof(float);
    if (count < kPanel) memset(scores, 0, kBlockBytes), memset(dp, 0, kBlockBytes);
    if (terms.cap > 0) memset(room_.slopes, 0, kBlockBytes);
    for (int64_t block = k_begin; block < k_end; block += kKeyBlock) {
      const int b = static_cast<int>((block - k_begin) / kKeyBlock);
      const BlockPart part(mask, block, at_most(k_end - block, kKeyBlock));
      const int num_keys = part.count;
      const int64_t first = block + part.skipped;
      const Visible visible = num_keys > 0 ? mask.visible(first, num_keys) : Visible::kNone;
      if (visible == Visible::kNone) continue;
      M::template multiply<Init::kZero>(num_keys, count, d_, M::from_row(k_[b], part.skipped), q_transposed, scores, kPanel);
      if (terms.any) terms.apply(scores, kPanel, begin, count, first, num_keys, room_.slopes);
      if (visible == Visible::kSome) mask.apply(scores, kPanel, first, num_keys);
      M::multiply_precisely(num_keys, count, d_, M::from_row(v_[b], part.skipped), dout_transposed, dp, kPanel);
      Gradients<M> g{M::left_room(room_.p, num_keys, kPanel), M::left_room(room_.ds, num_keys, kPanel),
                     M::right_room(room_.ds_right, num_keys, kPanel)};
      g.compute(scores, dp, terms.cap > 0 ? room_.slopes : nullptr, terms.log2_scale, num_keys, count, statistics, whole);
      if (item_.keys) {
        M::template multiply<Init::kAdd>(num_keys, d_, count, g.p, dout_rows, room_.key[b].dv + part.skipped * width_, width_);
        M::template multiply<Init::kAdd>(num_keys, d_, count, g.ds, q_rows, room_.key[b].dk + part.skipped * width_, width_);
      }
      if (item_.queries)
        M::template multiply<Init::kAdd>(d_, count, num_keys, M::from_depth(k_transposed_[b], part.skipped), g.ds_right, dq,
                                         kPanel);
    }
  }

  void finish_keys(int64_t begin, int64_t end) {
    const Rows<T> dk(a_.dk, s_.k_batch, s_.k_start, item_.head), dv(a_.dv, s_.k_batch, s_.k_start, item_.head);
    for (int64_t n = begin; n < end; ++n) {
      const auto& room = room_.key[(n - begin) / kKeyBlock];
      const int64_t row = (n - begin) % kKeyBlock * width_;
      each_vector(d_, [&](int64_t i, int lanes) {
        store_lanes(dk[n] + i, load(room.dk + row + i) * a_.scale, lanes);
        store_lanes(dv[n] + i, load(room.dv + row + i), lanes);
      });
    }
  }

  void finish_queries(int64_t tile) {
    for (int c = 0; c < kPanel; ++c) room_.scale[c] = a_.scale;
    for (int g = 0; g < group_; ++g) {
      const Rows<T> dq(a_.dq, s_.q_batch, s_.q_start, item_.head * group_ + g);
      for (int i = 0; i < panels_; ++i) {
        const int64_t begin = item_.q_begin + int64_t{i} * kPanel;
        put_transposed(room_.dq + (g * panels_ + i) * tile, kPanel, room_.scale, at_most(item_.q_end - begin, kPanel), d_,
                       [&](int c) { return dq[begin + c]; });
      }
    }
  }
};

template <class T>
void backward(const Attention& a) {
  parallel_for(a.num_items, [&](int64_t i) { Backward<T>(a, a.items[i]).run(); });
  zero_slack<T>(a.dq, a.q_used);
  zero_slack<T>(a.dk, a.k_used);
  zero_slack<T>(a.dv, a.k_used);
}

}  // namespace

void attention_backward(const Attention& a) {
  dispatch(a.q.dtype, [&](auto t) { backward<decltype(t)>(a); });
}

}  // namespace sora::SORA_TIER
