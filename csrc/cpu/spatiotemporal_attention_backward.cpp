// Attention through windows in space and time, backward: of the spans that do not see all of their samples; the others are
// attention_backward.cpp's.
//
// An item computes dQ of a stack of panels of queries, from the keys that they see, or dK and dV of a stack of panels of keys, from
// the queries that see them. Both are the same walk. With X0, X1 of the panel and Y0, Y1 of the blocks that it meets,
//
//   S^T = Y0 X0^T     P = 2^(c (S - maximum)) / sum     dP^T = Y1 X1^T     dS = P (dP - delta)
//   queries: X = Q, dO; Y = K, V      dQ^T += K^T dS^T
//   keys:    X = K, V;  Y = Q, dO     dK^T += Q^T dS^T      dV^T += dO^T P^T
//
// where maximum, sum and delta are per column for queries and per row for keys. So every sum is one item's own: there are no
// atomics, and memory is per thread and does not grow with the sample, for seven products instead of five.
#include "window.h"

namespace sora::SORA_TIER {
namespace {

constexpr int kPanel = kWindowPanel;
constexpr int kBlock = kTiles ? 128 : 64;  // tokens of one block of scores

// Of some queries, each an array of as many numbers.
struct Statistics {
  float *maximum, *inverse, *delta;

  void take_room(Pieces& pieces, int count) {
    maximum = pieces.take(count), inverse = pieces.take(count), delta = pieces.take(count);
  }
  void put(int i, const QueryStatistics& q) const { maximum[i] = q.maximum, inverse[i] = q.inverse, delta[i] = q.delta; }
};

// A thread's memory for an item.
template <class T>
struct Room {
  using M = Multiplier<T>;
  T* rows[2];
  float* y[2];             // operands of the block
  float* y_transposed[2];  // and their transposes
  float *scores, *dp, *p, *ds;
  Statistics row;
  struct Panel {
    float* x[2];
    float* sum[2];
    Statistics column;
  } panel[kWindowPanels];
  float* factor;

  Room(Pieces& pieces, int d, int panels) {
    const int count = gathered(d);
    for (int n = 0; n < 2; ++n) {
      rows[n] = reinterpret_cast<T*>(pieces.take(gathered_size(d)));
      y[n] = pieces.take(M::left_size(count, d)), y_transposed[n] = pieces.take(M::left_size(d, count));
    }
    scores = pieces.take(kBlock * kPanel), dp = pieces.take(kBlock * kPanel);
    p = M::kInPlace ? scores : pieces.take(M::right_size(kBlock, kPanel));
    ds = M::kInPlace ? dp : pieces.take(M::right_size(kBlock, kPanel));
    row.take_room(pieces, count);
    for (int i = 0; i < panels; ++i) {
      for (int n = 0; n < 2; ++n)
        panel[i].x[n] = pieces.take(M::right_size(d, kPanel)), panel[i].sum[n] = pieces.take(padded(d) * kPanel);
      panel[i].column.take_room(pieces, kPanel);
    }
    factor = pieces.take(kPanel);
  }
};

template <class T, bool keys>
class Backward {
  using M = Multiplier<T>;
  using Left = typename M::Left;
  using Right = typename M::Right;
  static constexpr int kSums = keys ? 2 : 1;

  const typename M::Session session_;
  const Attention& a_;
  const WindowItem& item_;
  const Sample& s_;
  const int d_, group_;
  const WindowStack stack_;
  // Every token sees but itself: dS is exactly zero, and the rounding of delta must not leave anything else.
  const bool alone_;
  const Room<T> room_;
  Right x_[kWindowPanels][2];
  Left y_[2], y_transposed_[2];

 public:
  Backward(const SpatiotemporalAttention& w, const WindowItem& item)
      : a_(w.attention),
        item_(item),
        s_(a_.samples[item.sample]),
        d_(head_dim(a_.q)),
        group_(heads(a_.q) / heads(a_.k)),
        stack_(w, item),
        alone_(s_.q_size == stack_.grid.end - stack_.grid.begin &&
               stack_.grid.axis[0].window * stack_.grid.axis[1].window * stack_.grid.axis[2].window == 1),
        room_(on_scratch<Room<T>>(d_, stack_.panels)) {}

  void run() {
    start_panels();
    if (keys)
      for (int g = 0; g < group_; ++g) add_head(item_.head * group_ + g, item_.head);
    else
      add_head(item_.head, item_.head / group_);
    finish();
  }

 private:
  Rows<const T> rows(const Tensor& x, int head) const { return Rows<const T>(x, 0, s_.q_start, head); }

  QueryStatistics statistics(int head, int64_t n) const {
    return QueryStatistics(query_row(a_.maximum, s_, head)[n], query_row(a_.sum, s_, head)[n], rows(a_.out, head)[n],
                           rows(a_.dout, head)[n], d_);
  }

  void start_panels() {
    const Rows<const T> x[2] = {rows(keys ? a_.k : a_.q, item_.head), rows(keys ? a_.v : a_.dout, item_.head)};
    for (int i = 0; i < stack_.panels; ++i) {
      const WindowPanel& panel = stack_.panel[i];
      const auto& room = room_.panel[i];
      for (int n = 0; n < 2; ++n) {
        panel.gather(x[n], d_, room_.rows[0]);
        x_[i][n] = M::right_transposed(room_.rows[0], d_, panel.count, d_, room.x[n]);
      }
      for (int n = 0; n < kSums; ++n) memset(room.sum[n], 0, d_ * kPanel * sizeof(float));
      if (keys) continue;
      for (int c = 0; c < kPanel; ++c)
        room.column.put(c, c < panel.count ? statistics(item_.head, panel.token[c]) : QueryStatistics());
    }
  }

  // What the panels meet of one query head.
  void add_head(int head, int head_k) {
    const ScoreTerms terms(a_, s_, head);
    const Rows<const T> y[2] = {keys ? rows(a_.q, head) : rows(a_.k, head_k), keys ? rows(a_.dout, head) : rows(a_.v, head_k)};
    const auto pack = [&](const SpanGrid& grid, const Box& box, int count) {
      for (int n = 0; n < 2; ++n) {
        gather(y[n], grid, box, d_, room_.rows[n]);
        y_[n] = M::left(room_.rows[n], d_, count, d_, room_.y[n]);
        if (n < kSums) y_transposed_[n] = M::left_transposed(room_.rows[n], d_, count, d_, room_.y_transposed[n]);
      }
      if (keys) each_token(grid, box, [&](int i, int64_t n) { room_.row.put(i, statistics(head, n)); });
    };
    const auto add = [&](int i, int first, int count, Interval columns, auto mask) {
      const int begin = columns.begin, width = length(columns);
      float *scores = room_.scores, *dp = room_.dp;
      M::template multiply<Init::kZero>(count, width, d_, M::from_row(y_[0], first), M::from_column(x_[i][0], begin),
                                        scores + begin, kPanel);
      if (terms.any) terms.apply(scores, kPanel, 0, columns.end, 0, count, nullptr);
      mask(scores);
      M::multiply_precisely(count, width, d_, M::from_row(y_[1], first), M::from_column(x_[i][1], begin), dp + begin, kPanel);
      const Right p = M::right_room(room_.p, count, kPanel), ds = M::right_room(room_.ds, count, kPanel);
      gradients(i, first, count, columns, terms.log2_scale, p, ds);
      if (!alone_) add_to(i, 0, first, count, columns, ds);
      if (keys) add_to(i, 1, first, count, columns, p);
    };
    stack_.walk(s_.q_size, gathered(d_), kBlock, M::kDepth, pack, add);
  }

  void add_to(int i, int sum, int first, int count, Interval columns, Right b) {
    M::template multiply<Init::kAdd>(d_, length(columns), count, M::from_depth(y_transposed_[sum], first),
                                     M::from_column(b, columns.begin), room_.panel[i].sum[sum] + columns.begin, kPanel);
  }

  // Scores and dP [count, kPanel] -> P (for keys) and dS, as the operands that the products want.
  void gradients(int i, int first, int count, Interval columns, float log2_scale, Right p, Right ds) {
    float *scores = room_.scores, *dp = room_.dp;
    const Statistics &row = room_.row, &column = room_.panel[i].column;
    complete_pairs(scores, dp, count, kPanel, columns.begin, columns.end);
    for (int c = columns.begin; c < columns.end; c += W) {
      int j = 0;
      for (; j < count; j += 2) {
        vf probability[2], gradient[2];
#pragma GCC unroll 2
        for (int m = 0; m < 2; ++m) {
          const int at = (j + m) * kPanel + c, n = keys ? first + (j + m < count ? j + m : j) : c;
          const vf maximum = keys ? broadcast(row.maximum[n]) : load(column.maximum + c),
                   inverse = keys ? broadcast(row.inverse[n]) : load(column.inverse + c),
                   delta = keys ? broadcast(row.delta[n]) : load(column.delta + c);
          probability[m] = exp2<M::kRough>((load(scores + at) - maximum) * log2_scale) * inverse;
          gradient[m] = probability[m] * (load(dp + at) - delta);
        }
        if (keys) M::put_pair(p, j, c, probability[0], probability[1]);
        M::put_pair(ds, j, c, gradient[0], gradient[1]);
      }
      for (; j % M::kDepth != 0; j += 2) {
        if (keys) M::put_pair(p, j, c, vf{}, vf{});
        M::put_pair(ds, j, c, vf{}, vf{});
      }
    }
  }

  void finish() {
    const Tensor* results[2] = {keys ? &a_.dk : &a_.dq, &a_.dv};
    for (int n = 0; n < kSums; ++n) {
      const Rows<T> to(*results[n], 0, s_.q_start, item_.head);
      for (int c = 0; c < kPanel; ++c) room_.factor[c] = n == 0 ? a_.scale : 1;
      for (int i = 0; i < stack_.panels; ++i) {
        const int64_t* token = stack_.panel[i].token;
        put_transposed(room_.panel[i].sum[n], kPanel, room_.factor, stack_.panel[i].count, d_, [&](int c) { return to[token[c]]; });
      }
    }
  }
};

}  // namespace

void spatiotemporal_attention_backward(const SpatiotemporalAttention& w) {
  dispatch(w.attention.q.dtype, [&](auto t) {
    using T = decltype(t);
    parallel_for(w.num_items, [&](int64_t i) {
      const WindowItem& item = w.items[i];
      item.keys ? Backward<T, true>(w, item).run() : Backward<T, false>(w, item).run();
    });
  });
}

}  // namespace sora::SORA_TIER
