// Attention through windows: how a span's grid is cut into panels, and panels are stacked into items for threads.
//
// A panel is a box of at most kStackPanel tokens, on the lanes of vectors. An item is a stack of panels of one head: up to
// kOuterPanels along the outer axis and kMiddlePanels along the middle one. The box of tokens that they meet is gathered once for
// all of them. Tokens of other spans cost every panel the same, so they are left out.
//
// Cost model: the unit is the product of one met token and 16 lanes of a panel. A span costs
//
//   panels (computed + kGatherCost gathered + kPanelCost)
//
//   computed      columns of 16 lanes, times the tokens that they meet, in whole blocks of 32 tokens
//   gathered      tokens that an item gathers, divided by its panels
//   kGatherCost   units of a gathered token; kPanelCost: of a panel itself; both are measured
//
// Small panels meet few tokens that only some of their lanes need. Large panels share what they gather.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "../grid.h"
#include "attention.h"

namespace sora {

struct WindowCall {
  AttentionCall dense;  // spans that see all of their samples
  std::vector<SpanGrid> grids;
  std::vector<std::pair<int32_t, int32_t>> spans;  // of each sample: its first and the one after its last
  std::vector<WindowItem> items;
};

constexpr double kGatherCost = 4, kPanelCost = 64;

inline int32_t ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }

// Indices of an axis that `tokens` neighbours meet, far from its ends.
inline int32_t indices_met(const Axis& a, int32_t tokens) { return std::min(a.window + std::min(tokens, a.size) - 1, a.size); }

// Planes of the outer axis in a block: one, unless a panel would meet fewer than 32 tokens at a time.
inline int32_t planes_per_block(const SpanGrid& g) {
  return std::clamp(32 / (indices_met(g.axis[1], g.edge[1]) * indices_met(g.axis[2], g.edge[2])), 1, g.axis[0].size);
}

// The cost of a span with the panels that g.edge gives; see above.
inline double span_cost(const SpanGrid& g) {
  const auto [outer, middle, inner] = g.axis;
  const int32_t met = indices_met(middle, g.edge[1]) * indices_met(inner, g.edge[2]), planes = planes_per_block(g);
  // Lanes are in the order of the outer axis and skipped in columns of 16. So a column meets less along that axis than its panel.
  const int32_t columns = ceil_div(g.edge[0] * g.edge[1] * g.edge[2], 16);
  const int32_t blocks = ceil_div(indices_met(outer, ceil_div(g.edge[0], columns)), planes);
  const double computed = double(columns) * blocks * ceil_div(planes * met, 32) * 32;
  const int32_t panels[3] = {ceil_div(outer.size, g.edge[0]), ceil_div(middle.size, g.edge[1]), ceil_div(inner.size, g.edge[2])};
  const int32_t stack[2] = {std::min(panels[0], kOuterPanels), std::min(panels[1], kMiddlePanels)};
  const double gathered = double(indices_met(outer, stack[0] * g.edge[0])) * indices_met(middle, stack[1] * g.edge[1]) *
                          indices_met(inner, g.edge[2]) / (stack[0] * stack[1]);
  return double(panels[0]) * panels[1] * panels[2] * (computed + kGatherCost * gathered + kPanelCost);
}

// Gives the grid the panels of least cost, of all whose edges are powers of two.
inline void choose_panel(SpanGrid& grid) {
  SpanGrid best = grid;
  double least = span_cost(best);
  auto& [x, y, z] = grid.edge;
  for (x = 1; x <= kStackPanel && x / 2 < grid.axis[0].size; x *= 2)
    for (y = 1; x * y <= kStackPanel && y / 2 < grid.axis[1].size; y *= 2)
      for (z = 1; x * y * z <= kStackPanel && z / 2 < grid.axis[2].size; z *= 2)
        if (const double cost = span_cost(grid); cost < least) best = grid, least = cost;
  grid = best;
  grid.planes = planes_per_block(grid);
}

// Text sees all of its sample, and so do spans that are no larger than their windows.
inline bool has_windows(const SpanGrid& grid, const float* step) {
  bool whole = true;
  for (const Axis& a : grid.axis) whole &= a.size == 1 || (!a.causal && a.window == a.size);
  return grid.begin < grid.end && !whole && (step[0] != 0 || step[1] != 0 || step[2] != 0);
}

// The grid of a span, tokens [begin, end) of its sample. Any order of axes would do. The longest is the middle one, along which
// most panels of an item share what they meet. The last of the others is the inner one, whose tokens are closest.
inline SpanGrid span_grid(const int32_t* size, const float* step, const std::array<int32_t, 3>& window,
                          const std::array<bool, 3>& causal, int64_t begin, int64_t end) {
  Axis axis[3];
  for (int i = 0; i < 3; ++i) axis[i] = {size[i], window[i] == 0 ? size[i] : std::min(window[i], size[i]), causal[i], 1};
  axis[1].stride = size[2], axis[0].stride = int64_t{size[1]} * size[2];
  const int middle = size[1] >= size[0] && size[1] >= size[2] ? 1 : size[2] >= size[0] ? 2 : 0;
  SpanGrid grid{false, begin, end, {axis[middle == 0 ? 1 : 0], axis[middle], axis[middle == 2 ? 1 : 2]}, {1, 1, 1}, 1};
  grid.windowed = has_windows(grid, step);
  if (grid.windowed) choose_panel(grid);
  return grid;
}

// Items for queries, or for keys, of a windowed span.
inline void add_window_items(WindowCall& w, size_t sample, int32_t span, int32_t num_heads, bool keys) {
  const SpanGrid& grid = w.grids[span];
  // Fewer panels of long rows, which would not fit into a core's cache.
  const int32_t outer = std::clamp<int32_t>(kOuterPanels * 128 / w.dense.q.size[2], 1, kOuterPanels);
  const int32_t step[3] = {grid.edge[0] * outer, grid.edge[1] * kMiddlePanels, grid.edge[2]};
  const double others = double(w.dense.sample_list[sample].k_size - (grid.end - grid.begin));
  for (int32_t x = 0; x < grid.axis[0].size; x += step[0])
    for (int32_t y = 0; y < grid.axis[1].size; y += step[1])
      for (int32_t z = 0; z < grid.axis[2].size; z += step[2]) {
        const int32_t begin[3] = {x, y, z};
        WindowItem item{static_cast<int32_t>(sample), 0, span, keys, {}, 0};
        double tokens = 1, met = 1;
        for (int a = 0; a < 3; ++a) {
          item.box.axis[a] = {begin[a], std::min(begin[a] + step[a], grid.axis[a].size)};
          const Interval all = met_by(grid.axis[a], item.box.axis[a], keys);
          tokens *= item.box.axis[a].end - begin[a], met *= all.end - all.begin;
        }
        item.pairs = tokens * (met + others);
        for (item.head = 0; item.head < num_heads; ++item.head) w.items.push_back(item);
      }
}

inline void schedule_forward(WindowCall& w) {
  const int32_t num_heads = heads(w.dense.q);
  const int64_t step = queries_per_item(w.dense);
  for (size_t b = 0; b < w.spans.size(); ++b)
    for (int32_t span = w.spans[b].first; span < w.spans[b].second; ++span) {
      const SpanGrid& grid = w.grids[span];
      if (grid.windowed)
        add_window_items(w, b, span, num_heads, false);
      else
        add_items(w.dense, b, num_heads, false, grid.begin, grid.end, step);
    }
}

inline void schedule_backward(WindowCall& w) {
  const double max_pairs = pairs_per_thread(w.dense);
  for (size_t b = 0; b < w.spans.size(); ++b) {
    const auto [first, last] = w.spans[b];
    if (std::none_of(w.grids.begin() + first, w.grids.begin() + last, [](const SpanGrid& grid) { return grid.windowed; })) {
      add_backward_items(w.dense, b, max_pairs);
      continue;
    }
    for (int32_t span = first; span < last; ++span) {
      const SpanGrid& grid = w.grids[span];
      if (grid.windowed) {
        add_window_items(w, b, span, heads(w.dense.q), false);
        add_window_items(w, b, span, heads(w.dense.k), true);
      } else {
        add_cut_items(w.dense, b, grid.begin, grid.end, grid.begin, grid.end);
      }
    }
  }
}

inline void run(WindowCall& w, void (*dense)(const Attention&), void (*windows)(const SpatiotemporalAttention&)) {
  run(w.dense, dense);
  SpatiotemporalAttention a{w.dense, w.grids.data(), nullptr, 0};
  longest_first(w.items, a.items, a.num_items);
  windows(a);
}

}  // namespace sora
