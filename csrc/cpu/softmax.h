// The running softmax of a panel of queries, and the output it weighs: what is the same for every kind of attention, forward.
//
// Everything is computed transposed: scores S^T [keys, queries] = K Q^T with queries on the vector lanes. So softmax runs down the
// lanes with no horizontal step. With c = scale log2(e) and m the running maximum of S, a block of keys adds
//
//   P = 2^(c (S - m))      O^T = O^T 2^(c (m_old - m)) + V^T P      l = l 2^(c (m_old - m)) + sum P
//
// The difference comes before the factor: of scores of any size, the largest then gives exactly 2^0. In c S - c m, the rounding of
// c m alone would pass 2^127 for scores of 1e10, such as masks have.
#pragma once

#include "stack.h"

namespace sora::SORA_TIER {

constexpr int kPanel = 64;  // queries on the lanes of one panel
// Keys of one block of scores: the faster the products, the longer the sums that pay.
constexpr int kKeyBlock = kTiles ? 256 : kPairs ? 128 : 64;

// A running maximum is raised only when it is this far behind, in powers of 2, so that what was summed before rarely has to be
// scaled: numbers up to 2^8 lose no precision.
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
    const vf before = load(m + c * W);
    highest[c] = (highest[c] - before) * log2_scale > kBehind ? highest[c] : before;
    changed |= before != highest[c];
    store(m + c * W, highest[c]);
    highest[c] = highest[c] == -__builtin_inff() ? vf{} : highest[c];  // nothing seen yet: 2^(-inf - 0) is 0, not NaN
    const vf factor = exp2((before - highest[c]) * log2_scale);
    store(correction + c * W, factor);
    total[c] = load(l + c * W) * factor;
  }
  complete_pairs(s, nullptr, num_keys, kPanel, 0, NV * W);
  int j = 0;
  for (; j < num_keys; j += 2, s += 2 * kPanel) {
#pragma GCC unroll 4
    for (int c = 0; c < NV; ++c) {
      const vf even = exp2<M::kRough>((load(s + c * W) - highest[c]) * log2_scale),
               odd = exp2<M::kRough>((load(s + kPanel + c * W) - highest[c]) * log2_scale);
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

// Keys of a block of scores: those of an operand, or some of them. Parts but the last have multiples of kDepth keys.
template <class M>
struct KeyPart {
  typename M::Left k, v;
  int count;
};

// A thread's memory for one block of scores.
template <class M>
struct ScoreRoom {
  float *scores, *probabilities, *correction;
  explicit ScoreRoom(Pieces& pieces) {
    scores = pieces.take(kKeyBlock * kPanel);
    probabilities = M::kInPlace ? scores : pieces.take(M::right_size(kKeyBlock, kPanel));
    correction = pieces.take(kPanel);
  }
};

// Up to kPanel queries of one head, and what became of them so far.
template <class M>
struct QueryPanel {
  float *q_room, *out, *m, *l;
  typename M::Right q;

  void take_room(Pieces& pieces, int d) {
    q_room = pieces.take(M::right_size(d, kPanel)), out = pieces.take(padded(d) * kPanel);
    m = pieces.take(kPanel), l = pieces.take(kPanel);
  }

  template <class T>
  void start(const T* rows, int64_t stride, int count, int d) {
    q = M::right_transposed(rows, stride, count, d, q_room);
    for (int c = 0; c < kPanel; ++c) m[c] = -__builtin_inff(), l[c] = 0;
    memset(out, 0, d * kPanel * sizeof(float));
  }

  // Adds a block of keys for the queries on columns [begin, end), in whole vectors; `masked(scores)` makes scores of products.
  template <class Masked>
  void add(int begin, int end, int d, const KeyPart<M>* parts, int num_parts, float log2_scale, const ScoreRoom<M>& room,
           Masked masked) {
    DepthPart<typename M::Left> v[kMaxParts];
    int num_keys = 0;
    for (int i = 0; i < num_parts; num_keys += parts[i++].count) {
      M::template multiply<Init::kZero>(parts[i].count, end - begin, d, parts[i].k, M::from_column(q, begin),
                                        room.scores + num_keys * kPanel + begin, kPanel);
      v[i] = {parts[i].v, parts[i].count};
    }
    masked(room.scores);
    const typename M::Right p = M::right_room(room.probabilities, num_keys, kPanel);
    if (online_softmax_columns<M>(end, room.scores, num_keys, log2_scale, m, l, room.correction, p, begin))
      for (int i = 0; i < d; ++i)
        for (int c = begin; c < end; c += W) store(out + i * kPanel + c, load(out + i * kPanel + c) * load(room.correction + c));
    M::add_parts(d, end - begin, v, num_parts, M::from_column(p, begin), out + begin, kPanel);
  }

  // The results: query c's output to row(c), and statistics(c, maximum, sum).
  template <class Row, class Put>
  void finish(int count, int d, const ScoreRoom<M>& room, Row row, Put statistics) const {
    for (int c = 0; c < count; ++c) {
      statistics(c, m[c], l[c]);
      room.correction[c] = l[c] == 0 ? 0 : 1 / l[c];
    }
    put_transposed(out, kPanel, room.correction, count, d, row);
  }
};

}  // namespace sora::SORA_TIER
