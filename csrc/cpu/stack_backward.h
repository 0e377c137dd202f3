// Attention of a stack of panels, backward: see stack.h.
//
// A stack computes dQ of panels of queries, from the keys that they see, or dK and dV of panels of keys, from the queries that see
// them. Both are the same walk. With X0, X1 of the panel and Y0, Y1 of the blocks that it meets,
//
//   S^T = Y0 X0^T     P = 2^(c (S - maximum)) / sum     dP^T = Y1 X1^T     dS = P (dP - delta + dlse)
//   queries: X = Q, dO; Y = K, V      dQ^T += K^T dS^T
//   keys:    X = K, V;  Y = Q, dO     dK^T += Q^T dS^T      dV^T += dO^T P^T
//
// where maximum, sum and delta are per column for queries and per row for keys. So every sum is one stack's own: there are no
// atomics, and memory is per thread and does not grow with the sample, for seven products instead of five.
#pragma once

#include "stack.h"

namespace sora::SORA_TIER {

constexpr int kBlock = kTiles ? 128 : 64;  // tokens of one block of scores

// Of some queries, each an array of as many numbers.
struct RowStatistics {
  float *maximum, *inverse, *delta;

  void take_room(Pieces& pieces, int count) {
    maximum = pieces.take(count), inverse = pieces.take(count), delta = pieces.take(count);
  }
  void copy(int to, const RowStatistics& from, int first, int count) const {
    memcpy(maximum + to, from.maximum + first, count * sizeof(float));
    memcpy(inverse + to, from.inverse + first, count * sizeof(float));
    memcpy(delta + to, from.delta + first, count * sizeof(float));
  }
  void put(int i, const QueryStatistics& q) const { maximum[i] = q.maximum, inverse[i] = q.inverse, delta[i] = q.delta; }
};

// A thread's memory for a stack.
template <class T>
struct BackwardRoom {
  using M = Multiplier<T>;
  T* rows[2];
  float* y[2];             // operands of blocks
  float* y_transposed[2];  // and their transposes
  float *scores, *dp, *p, *ds;
  RowStatistics row, met;  // of what is packed, and of what a panel meets of it at once
  struct Panel {
    float* x[2];
    float* sum[2];
    RowStatistics column;
  } panel[kStackPanels];
  float* factor;

  BackwardRoom(Pieces& pieces, int d, int count, int panels) {
    for (int n = 0; n < 2; ++n) {
      rows[n] = reinterpret_cast<T*>(pieces.take(int64_t{larger(count, kStackPanel)} * d));
      y[n] = pieces.take(M::left_size(count, d)), y_transposed[n] = pieces.take(M::left_size(d, count));
    }
    scores = pieces.take(kBlock * kStackPanel), dp = pieces.take(kBlock * kStackPanel);
    p = M::kInPlace ? scores : pieces.take(M::right_size(kBlock, kStackPanel));
    ds = M::kInPlace ? dp : pieces.take(M::right_size(kBlock, kStackPanel));
    row.take_room(pieces, count), met.take_room(pieces, kBlock);
    for (int i = 0; i < panels; ++i) {
      for (int n = 0; n < 2; ++n)
        panel[i].x[n] = pieces.take(M::right_size(d, kStackPanel)), panel[i].sum[n] = pieces.take(padded(d) * kStackPanel);
      panel[i].column.take_room(pieces, kStackPanel);
    }
    factor = pieces.take(kStackPanel);
  }
};

template <class T, bool keys, class Stack>
class StackBackward {
  using M = Multiplier<T>;
  using Left = typename M::Left;
  using Right = typename M::Right;
  static constexpr int kSums = keys ? 2 : 1;

  const typename M::Session session_;
  const Attention& a_;
  const Sample& s_;
  const int head_, d_, group_;
  const Stack& stack_;
  const bool alone_;  // dS is exactly zero then, and the rounding of delta must not leave anything else
  const BackwardRoom<T> room_;
  Right x_[kStackPanels][2];
  Left y_[2][kMaxOperands], y_transposed_[2][kMaxOperands];
  int packed_ = 0, first_[kMaxOperands];  // tokens

 public:
  StackBackward(const Attention& a, const Sample& s, int head, const Stack& stack)
      : a_(a),
        s_(s),
        head_(head),
        d_(head_dim(a_.q)),
        group_(heads(a_.q) / heads(a_.k)),
        stack_(stack),
        alone_(stack.alone()),
        room_(on_scratch<BackwardRoom<T>>(d_, Stack::template gathered<T>(d_), stack_.panels)) {}

  void run() {
    start_panels();
    if (keys)
      for (int g = 0; g < group_; ++g) add_head(head_ * group_ + g, head_);
    else
      add_head(head_, head_ / group_);
    finish();
  }

 private:
  Rows<const T> of_queries(const Tensor& x, int head) const { return Rows<const T>(x, 0, s_.q_start, head); }
  Rows<const T> of_keys(const Tensor& x, int head) const { return Rows<const T>(x, 0, s_.k_start, head); }

  QueryStatistics statistics(int head, int64_t n) const {
    QueryStatistics q(query_row(a_.maximum, s_, head)[n], query_row(a_.sum, s_, head)[n], of_queries(a_.out, head)[n],
                      of_queries(a_.dout, head)[n], d_);
    if (a_.dlse && q.inverse != 0) q.delta -= query_row(a_.dlse, s_, head)[n];
    return q;
  }

  void start_panels() {
    const Rows<const T> x[2] = {keys ? of_keys(a_.k, head_) : of_queries(a_.q, head_),
                                keys ? of_keys(a_.v, head_) : of_queries(a_.dout, head_)};
    for (int i = 0; i < stack_.panels; ++i) {
      const auto& panel = stack_.panel[i];
      const auto& room = room_.panel[i];
      for (int n = 0; n < 2; ++n) {
        const StridedRows<T> own = panel.rows(x[n], d_, room_.rows[0]);
        x_[i][n] = M::right_transposed(own.data, own.stride, panel.count, d_, room.x[n]);
      }
      for (int n = 0; n < kSums; ++n) memset(room.sum[n], 0, d_ * kStackPanel * sizeof(float));
      if (keys) continue;
      for (int c = 0; c < kStackPanel; ++c)
        room.column.put(c, c < panel.count ? statistics(head_, panel.token(c)) : QueryStatistics());
    }
  }

  // What the panels meet of one query head.
  void add_head(int head, int head_k) {
    const ScoreTerms terms(a_, s_, head);
    const Rows<const T> y[2] = {keys ? of_queries(a_.q, head) : of_keys(a_.k, head_k),
                                keys ? of_queries(a_.dout, head) : of_keys(a_.v, head_k)};
    const auto pack = [&](int operand, const auto& block) {
      if (operand == 0) packed_ = 0;
      first_[operand] = packed_;
      for (int n = 0; n < 2; ++n) {
        const StridedRows<T> met = block.rows(y[n], d_, room_.rows[n]);
        y_[n][operand] = M::left(met.data, met.stride, block.count, d_, room_.y[n] + M::left_size(packed_, d_));
        if (n < kSums)
          y_transposed_[n][operand] =
              M::left_transposed(met.data, met.stride, block.count, d_, room_.y_transposed[n] + M::left_size(d_, packed_));
      }
      if (keys) block.each_token([&](int i, int64_t n) { room_.row.put(packed_ + i, statistics(head, n)); });
      packed_ += operand_tokens(block.count);
    };
    const auto add = [&](int i, const Parts& parts, Interval columns, auto mask) {
      float *scores = room_.scores, *dp = room_.dp;
      multiply_parts(i, 0, parts, columns, scores);
      if (terms.any) terms.apply(scores, kStackPanel, 0, columns.end, 0, parts.tokens, nullptr);
      mask(scores);
      multiply_parts(i, 1, parts, columns, dp);
      const Right p = M::right_room(room_.p, parts.tokens, kStackPanel), ds = M::right_room(room_.ds, parts.tokens, kStackPanel);
      gradients(i, parts.tokens, columns, terms.log2_scale, p, ds);
      if (!alone_) add_to(i, 0, parts, columns, ds);
      if (keys) add_to(i, 1, parts, columns, p);
    };
    stack_.walk(head, {Stack::template gathered<T>(d_), kBlock, M::kDepth}, pack, add);
  }

  // Y_n X_n^T of the parts, one after the other; with the second, the statistics of what is met.
  void multiply_parts(int i, int n, const Parts& parts, Interval columns, float* to) {
    int done = 0;
    for (int m = 0; m < parts.size; done += parts.part[m++].count) {
      const auto [operand, first, count] = parts.part[m];
      const Left y = M::from_row(y_[n][operand], first);
      const Right x = M::from_column(x_[i][n], columns.begin);
      float* c = to + done * kStackPanel + columns.begin;
      if (n == 0)
        M::template multiply<Init::kZero>(count, length(columns), d_, y, x, c, kStackPanel);
      else
        M::multiply_precisely(count, length(columns), d_, y, x, c, kStackPanel);
      if (keys && n == 1) room_.met.copy(done, room_.row, first_[operand] + first, count);
    }
  }

  void add_to(int i, int sum, const Parts& parts, Interval columns, Right b) {
    DepthPart<Left> y[kMaxParts];
    for (int m = 0; m < parts.size; ++m) {
      const auto [operand, first, count] = parts.part[m];
      y[m] = {M::from_depth(y_transposed_[sum][operand], first), count};
    }
    M::add_parts(d_, length(columns), y, parts.size, M::from_column(b, columns.begin), room_.panel[i].sum[sum] + columns.begin,
                 kStackPanel);
  }

  // Scores and dP [count, kStackPanel] -> P (for keys) and dS, as the operands that the products want.
  void gradients(int i, int count, Interval columns, float log2_scale, Right p, Right ds) {
    float *scores = room_.scores, *dp = room_.dp;
    const RowStatistics &row = room_.met, &column = room_.panel[i].column;
    complete_pairs(scores, dp, count, kStackPanel, columns.begin, columns.end);
    for (int c = columns.begin; c < columns.end; c += W) {
      int j = 0;
      for (; j < count; j += 2) {
        vf probability[2], gradient[2];
#pragma GCC unroll 2
        for (int m = 0; m < 2; ++m) {
          const int at = (j + m) * kStackPanel + c, n = keys ? (j + m < count ? j + m : j) : c;
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
      const Rows<T> to(*results[n], 0, keys ? s_.k_start : s_.q_start, head_);
      for (int c = 0; c < kStackPanel; ++c) room_.factor[c] = n == 0 ? a_.scale : 1;
      for (int i = 0; i < stack_.panels; ++i) {
        const auto& panel = stack_.panel[i];
        put_transposed(room_.panel[i].sum[n], kStackPanel, room_.factor, panel.count, d_,
                       [&](int c) { return to[panel.token(c)]; });
      }
    }
  }
};

template <class T, class Stack>
void stack_backward(const Attention& a, const Sample& s, int head, bool keys, const Stack& stack) {
  if (keys)
    StackBackward<T, true, Stack>(a, s, head, stack).run();
  else
    StackBackward<T, false, Stack>(a, s, head, stack).run();
}

}  // namespace sora::SORA_TIER
