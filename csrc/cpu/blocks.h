// Block-sparse attention: panels of some blocks of tokens, and the walk over the blocks that they meet. See stack.h.
//
// Blocks that are met are walked as they rise. Neighbours among them become operands together, and a panel takes those that it
// meets of them in as long runs as it can.
#pragma once

#include "stack.h"

namespace sora::SORA_TIER {

struct BlockPanel {
  int64_t begin;
  int count;
  int32_t block;  // whose tokens they are

  int64_t token(int lane) const { return begin + lane; }
  Interval columns() const { return {0, (count + kPanelColumns - 1) / kPanelColumns * kPanelColumns}; }
  template <class T>
  StridedRows<T> rows(const Rows<const T>& x, int, T*) const {
    return {x[begin], x.stride};
  }
};

struct BlockStack {
  int panels = 0;
  BlockPanel panel[kStackPanels];

  BlockStack(const BlockSparseAttention& a, const BlockItem& item)
      : lists_(item.keys ? a.of_keys : a.of_queries),
        blocks_(item.keys ? a.blocks_k : a.blocks_q),
        met_(item.keys ? a.cu_q : a.cu_k) {
    const int32_t* own = item.keys ? a.cu_k : a.cu_q;
    int64_t token = item.token;
    for (int32_t block = item.block; panels < item.panels; token = own[++block])
      for (; token < own[block + 1] && panels < item.panels; token += kStackPanel)
        panel[panels++] = {token, at_most(own[block + 1] - token, kStackPanel), block};
  }

  bool alone() const { return false; }

  // Where tiles multiply numbers of 16 bits, whose operands are short, a panel is soon done with what it meets: it needs more.
  template <class T>
  static int gathered(int d) {
    constexpr int kNumbers = kTiles && sizeof(T) == 2 ? 1 << 17 : 1 << 15;
    return clamp(kNumbers / d / kOperandStep * kOperandStep, kOperandStep, 1024);
  }

  template <class Pack, class Add>
  void walk(int head, Walk by, Pack pack, Add add) const {
    Cursors cursor;
    for (int i = 0; i < panels; ++i) {
      const int32_t* offsets = lists_.offsets + (lists_.shared ? 0 : int64_t{head} * blocks_) + panel[i].block;
      cursor.of[i] = {lists_.indices + offsets[0], lists_.indices + offsets[1]};
    }
    cursor.panels = panels;
    while (cursor.block() != kNone) {
      const int32_t first = cursor.block();
      if (size(first, first + 1) > by.gathered) {
        for (int64_t at = met_[first]; at < met_[first + 1]; at += by.gathered) {
          const Run part{first, first + 1, {at, at_most(met_[first + 1] - at, by.gathered)}};
          pack(0, part.tokens);
          add_runs(&part, 1, cursor, by, add);
        }
        cursor.skip(first + 1);
        continue;
      }
      Run runs[kMaxOperands];
      int num_runs = 0, room = by.gathered;
      Cursors ahead = cursor;
      while (num_runs < kMaxOperands && ahead.block() != kNone && size(ahead.block(), ahead.block() + 1) <= room) {
        Run& run = runs[num_runs];
        run.first = ahead.block(), run.last = end_of_run(ahead, room, by.depth);
        run.tokens = {met_[run.first], at_most(size(run.first, run.last), room)};
        pack(num_runs++, run.tokens);
        room -= operand_tokens(run.tokens.count);
      }
      add_runs(runs, num_runs, cursor, by, add);
      cursor = ahead;
    }
  }

 private:
  static constexpr int32_t kNone = INT32_MAX;

  // What a panel has yet to meet.
  struct Cursor {
    const int32_t *next, *end;
    int32_t block() const { return next < end ? *next : kNone; }
    void skip(int32_t last) {
      while (next < end && *next < last) ++next;
    }
  };
  struct Cursors {
    int panels;
    Cursor of[kStackPanels];
    int32_t block() const {
      int32_t block = kNone;
      for (int i = 0; i < panels; ++i) block = smaller(block, of[i].block());
      return block;
    }
    void skip(int32_t last) {
      for (int i = 0; i < panels; ++i) of[i].skip(last);
    }
  };

  // Blocks [first, last), or some tokens of one: an operand.
  struct Run {
    int32_t first, last;
    TokenRun tokens;
  };

  const BlockLists lists_;
  const int64_t blocks_;  // of which the panels are some
  const int32_t* const met_;

  int64_t size(int32_t first, int32_t last) const { return met_[last] - met_[first]; }

  // One past the last of the neighbouring blocks that panels meet, that fit, and that begin at multiples of `depth` tokens. Of
  // these, nothing is ahead any more.
  int32_t end_of_run(Cursors& ahead, int room, int depth) const {
    const int32_t first = ahead.block();
    int32_t last = first;
    do {
      ahead.skip(++last);
    } while (ahead.block() == last && size(first, last + 1) <= room && size(first, last) % depth == 0);
    return last;
  }

  // What each panel meets of the runs, in as many parts as are taken at once.
  template <class Add>
  void add_runs(const Run* runs, int num_runs, const Cursors& cursors, Walk by, Add add) const {
    const auto no_mask = [](float*) {};
    for (int i = 0; i < panels; ++i) {
      Cursor cursor = cursors.of[i];
      Parts parts;
      for (int n = 0; n < num_runs; ++n) {
        const Run& run = runs[n];
        while (cursor.block() < run.last) {
          const int32_t block = cursor.block();
          int32_t after = block;
          do {
            cursor.skip(++after);
          } while (cursor.block() == after && after < run.last);
          int first = static_cast<int>(larger(met_[block], run.tokens.begin) - run.tokens.begin);
          const int end = static_cast<int>(smaller(met_[after], run.tokens.begin + run.tokens.count) - run.tokens.begin);
          while (first < end) {
            const int count = smaller(end - first, by.at_once - parts.tokens);
            parts.add({n, first, count}), first += count;
            if (parts.size < kMaxParts && parts.tokens < by.at_once && parts.tokens % by.depth == 0) continue;
            add(i, parts, panel[i].columns(), no_mask);
            parts = {};
          }
        }
      }
      if (parts.size > 0) add(i, parts, panel[i].columns(), no_mask);
    }
  }
};

}  // namespace sora::SORA_TIER
