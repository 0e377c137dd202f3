// Windows in space and time: who sees whom along an axis of a grid.
//
// Both the bindings and every tier compile this, so its functions keep to their object file: of any others the linker would keep
// one tier's copy for all.
#pragma once

#include "kernels.h"

namespace sora {

static inline int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }
static inline int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

// The keys that a query at x sees along an axis: NATTEN's rule.
static inline Interval keys_seen(const Axis& a, int32_t x) {
  if (a.causal) return {larger(x - a.window + 1, 0), x + 1};
  const int32_t begin = smaller(larger(x - a.window / 2, 0), a.size - a.window);
  return {begin, begin + a.window};
}

// The queries that see a key at x. They are neighbours, as neither end of what a query sees falls from one query to the next.
static inline Interval queries_seeing(const Axis& a, int32_t x) {
  if (a.causal) return {x, smaller(x + a.window, a.size)};
  return {x < a.window ? 0 : x - a.window + 1 + a.window / 2, x >= a.size - a.window ? a.size : x + a.window / 2 + 1};
}

// All that the tokens of an interval meet: the keys that they see as queries, or the queries that see them as keys.
static inline Interval met_by(const Axis& a, Interval tokens, bool keys) {
  if (keys) return {queries_seeing(a, tokens.begin).begin, queries_seeing(a, tokens.end - 1).end};
  return {keys_seen(a, tokens.begin).begin, keys_seen(a, tokens.end - 1).end};
}

}  // namespace sora
