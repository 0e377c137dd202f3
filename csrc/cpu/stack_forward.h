// Attention of a stack of panels of queries, forward: see stack.h for what they meet, and softmax.h for what becomes of it.
#pragma once

#include "softmax.h"
#include "stack.h"

namespace sora::SORA_TIER {

static_assert(kPanel == kStackPanel);

// A thread's memory for a stack.
template <class T>
struct StackRoom {
  using M = Multiplier<T>;
  T* rows;
  float *k, *v;  // of operands
  ScoreRoom<M> block;
  QueryPanel<M> panel[kStackPanels];

  StackRoom(Pieces& pieces, int d, int gathered, int panels)
      : rows(reinterpret_cast<T*>(pieces.take(int64_t{larger(gathered, kStackPanel)} * d))),
        k(pieces.take(M::left_size(gathered, d))),
        v(pieces.take(M::left_size(d, gathered))),
        block(pieces) {
    for (int i = 0; i < panels; ++i) panel[i].take_room(pieces, d);
  }
};

template <class T, class Stack>
void stack_forward(const Attention& a, const Sample& s, int head, const Stack& stack) {
  using M = Multiplier<T>;
  const typename M::Session session;
  const int d = head_dim(a.q), head_k = head / (heads(a.q) / heads(a.k));
  const ScoreTerms terms(a, s, head);
  const int gathered = Stack::template gathered<T>(d);
  StackRoom<T> room(on_scratch<StackRoom<T>>(d, gathered, stack.panels));

  const Rows<const T> q(a.q, 0, s.q_start, head);
  for (int i = 0; i < stack.panels; ++i) {
    const StridedRows<T> x = stack.panel[i].rows(q, d, room.rows);
    room.panel[i].start(x.data, x.stride, stack.panel[i].count, d);
  }

  const Rows<const T> k(a.k, 0, s.k_start, head_k), v(a.v, 0, s.k_start, head_k);
  typename M::Left k_operand[kMaxOperands], v_operand[kMaxOperands];
  int packed = 0;  // tokens
  const auto pack = [&](int n, const auto& block) {
    if (n == 0) packed = 0;
    const StridedRows<T> x = block.rows(k, d, room.rows);
    k_operand[n] = M::left(x.data, x.stride, block.count, d, room.k + M::left_size(packed, d));
    const StridedRows<T> y = block.rows(v, d, room.rows);
    v_operand[n] = M::left_transposed(y.data, y.stride, block.count, d, room.v + M::left_size(d, packed));
    packed += operand_tokens(block.count);
  };
  const auto add = [&](int i, const Parts& parts, Interval columns, auto mask) {
    KeyPart<M> keys[kMaxParts];
    for (int n = 0; n < parts.size; ++n) {
      const auto [operand, first, count] = parts.part[n];
      keys[n] = {M::from_row(k_operand[operand], first), M::from_depth(v_operand[operand], first), count};
    }
    room.panel[i].add(columns.begin, columns.end, d, keys, parts.size, terms.log2_scale, room.block, [&](float* scores) {
      if (terms.any) terms.apply(scores, kPanel, 0, columns.end, 0, parts.tokens, nullptr);
      mask(scores);
    });
  };
  stack.walk(head, {gathered, kKeyBlock, M::kDepth}, pack, add);

  const Rows<T> out(a.out, 0, s.q_start, head);
  float *maximum = query_row(a.maximum, s, head), *sum = query_row(a.sum, s, head);
  float* lse = a.lse ? query_row(a.lse, s, head) : nullptr;
  for (int i = 0; i < stack.panels; ++i) {
    const auto& panel = stack.panel[i];
    room.panel[i].finish(
        panel.count, d, room.block, [&](int c) { return out[panel.token(c)]; },
        [&](int c, float m, float l) {
          const int64_t n = panel.token(c);
          maximum[n] = m, sum[n] = l;
          if (lse != nullptr) lse[n] = log_sum(m, l, terms.unit);
        });
  }
}

}  // namespace sora::SORA_TIER
