// Stacks of panels, for attention in which some tokens meet some others: through windows (window.h) or by blocks (blocks.h).
//
// A panel's tokens, at most kStackPanel of a head, are on the vector lanes. They are queries that meet the keys which they see, or
// keys that meet the queries which see them. What is met comes in blocks of tokens, each of which becomes operands once for all
// panels of a stack. A stack has
//
//   panels, panel[i]    with count, token(lane), columns(), and rows(x, d, room): their rows, in place or gathered into the room
//   alone()             every token sees but itself
//   gathered<T>(d)      the most tokens whose operands are there at once, as many as fit into a core's cache
//   walk(head, by, pack, add)    all that the panels meet of query head `head`. It calls
//     pack(n, block)      to make operand n of a block of tokens; operand 0 replaces all of those before
//     add(i, parts, columns, mask)    for panel i and at most by.at_once tokens of operands
//                       where mask(scores) makes those of pairs that do not meet -inf.
//
// Blocks have count, rows() as panels have, and each_token(body), which calls body(i, n) for each i-th token n. Tokens are numbered
// within the sample. The order of a walk is the stack's own, so a stack must not depend on the number of threads or on what a
// sample is packed with.
#pragma once

#include "attention.h"
#include "grid.h"

namespace sora::SORA_TIER {

constexpr int kPanelColumns = 16;  // columns that are left out together

constexpr int kMaxOperands = 64;
// Operands begin at multiples of as many tokens in their memory. It is a multiple of what any product needs.
constexpr int kOperandStep = 32;
inline int operand_tokens(int count) { return (count + kOperandStep - 1) / kOperandStep * kOperandStep; }

inline int32_t length(Interval x) { return x.end - x.begin; }

struct Walk {
  int gathered, at_once, depth;
};

// Tokens of operands, one after the other: `count` from `first`, a multiple of Walk's depth, on.
constexpr int kMaxParts = 8;
struct Part {
  int operand, first, count;
};
struct Parts {
  int size = 0, tokens = 0;
  Part part[kMaxParts];

  void add(Part next) { part[size++] = next, tokens += next.count; }
};

template <class T>
struct StridedRows {
  const T* data;
  int64_t stride;
};

// Neighbouring tokens from `begin` on.
struct TokenRun {
  int64_t begin;
  int count;

  template <class Body>
  void each_token(Body body) const {
    for (int i = 0; i < count; ++i) body(i, begin + i);
  }
  template <class T>
  StridedRows<T> rows(const Rows<const T>& x, int, T*) const {
    return {x[begin], x.stride};
  }
};

}  // namespace sora::SORA_TIER
