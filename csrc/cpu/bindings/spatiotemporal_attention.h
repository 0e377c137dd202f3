// Attention through windows in space and time: checks, samples and work items.
#pragma once

#include "../grid.h"
#include "attention.h"

namespace sora {

struct WindowCall {
  AttentionCall dense;  // spans that see all of their samples
  std::vector<Grid> grids;
  std::vector<std::pair<int32_t, int32_t>> spans;  // of each sample: its first and the one after its last
  std::vector<WindowItem> items;
};

// How much of an axis `tokens` neighbours meet, far from its ends.
inline int32_t mostly_met(const Axis& a, int32_t tokens) { return std::min(a.window + std::min(tokens, a.size) - 1, a.size); }

inline int32_t parts(int32_t size, int32_t edge) { return (size + edge - 1) / edge; }

// Planes of the outer axis in a block: one, unless a panel would meet too little at a time.
inline int32_t planes_of(const Grid& g) {
  return std::clamp(32 / (mostly_met(g.axis[1], g.edge[1]) * mostly_met(g.axis[2], g.edge[2])), 1, g.axis[0].size);
}

// The work of a span with such panels, in products of a token that is met and 16 lanes: what panels compute, and what it takes to
// gather the tokens that an item's panels share.
inline double work_of(const Grid& g) {
  constexpr double kGather = 4, kPanel = 64;  // measured: of a token, and of a panel itself
  const auto [outer, middle, inner] = g.axis;
  const int32_t met = mostly_met(middle, g.edge[1]) * mostly_met(inner, g.edge[2]);
  // Lanes are in the order of the outer axis and left out by 16, so each 16 meet less along it than the panel.
  const int32_t columns = parts(g.edge[0] * g.edge[1] * g.edge[2], 16);
  const double computed =
      double(columns) * parts(mostly_met(outer, parts(g.edge[0], columns)), planes_of(g)) * parts(planes_of(g) * met, 32) * 32;
  const int32_t panels[3] = {parts(outer.size, g.edge[0]), parts(middle.size, g.edge[1]), parts(inner.size, g.edge[2])};
  const int32_t stack[2] = {std::min(panels[0], kOuterPanels), std::min(panels[1], kMiddlePanels)};
  const double gathered = double(mostly_met(outer, stack[0] * g.edge[0])) * mostly_met(middle, stack[1] * g.edge[1]) *
                          mostly_met(inner, g.edge[2]) / (stack[0] * stack[1]);
  return double(panels[0]) * panels[1] * panels[2] * (computed + kGather * gathered + kPanel);
}

// Text sees all of its sample, and so do spans that are no larger than their windows.
inline bool windowed(const Grid& grid, const float* step) {
  bool whole = true;
  for (const Axis& a : grid.axis) whole &= a.size == 1 || (!a.causal && a.window == a.size);
  return grid.begin < grid.end && !whole && (step[0] != 0 || step[1] != 0 || step[2] != 0);
}

// Any order of axes would do. The longest is the middle one, along which most panels of an item share what they meet; and the last
// of the others the inner one, whose tokens are closest.
inline Grid grid_of(const int32_t* size, const float* step, const std::array<int32_t, 3>& window, const std::array<bool, 3>& causal,
                    int64_t begin, int64_t end) {
  Axis axis[3];
  for (int i = 0; i < 3; ++i) axis[i] = {size[i], window[i] == 0 ? size[i] : std::min(window[i], size[i]), causal[i], 1};
  axis[1].stride = size[2], axis[0].stride = int64_t{size[1]} * size[2];
  const int middle = size[1] >= size[0] && size[1] >= size[2] ? 1 : size[2] >= size[0] ? 2 : 0;
  Grid grid{true, begin, end, {axis[middle == 0 ? 1 : 0], axis[middle], axis[middle == 2 ? 1 : 2]}, {1, 1, 1}, 1};
  if (!windowed(grid, step)) {
    grid.windowed = false;
    return grid;
  }
  Grid best = grid;
  double least = work_of(best);
  auto& [x, y, z] = grid.edge;
  for (x = 1; x <= kWindowPanel && x / 2 < grid.axis[0].size; x *= 2)
    for (y = 1; x * y <= kWindowPanel && y / 2 < grid.axis[1].size; y *= 2)
      for (z = 1; x * y * z <= kWindowPanel && z / 2 < grid.axis[2].size; z *= 2)
        if (const double work = work_of(grid); work < least) best = grid, least = work;
  best.planes = planes_of(best);
  return best;
}

// Items for queries, or for keys, of a windowed span.
inline void add_window_items(WindowCall& w, size_t sample, int32_t span, int32_t num_heads, bool keys) {
  const Grid& grid = w.grids[span];
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

inline void window_forward_items(WindowCall& w) {
  const int32_t num_heads = heads(w.dense.q);
  const int64_t step = queries_of_item(w.dense);
  for (size_t b = 0; b < w.spans.size(); ++b)
    for (int32_t span = w.spans[b].first; span < w.spans[b].second; ++span) {
      const Grid& grid = w.grids[span];
      if (grid.windowed)
        add_window_items(w, b, span, num_heads, false);
      else
        add_items(w.dense, b, num_heads, false, grid.begin, grid.end, step);
    }
}

inline void window_backward_items(WindowCall& w) {
  const double share = share_of_thread(w.dense);
  for (size_t b = 0; b < w.spans.size(); ++b) {
    const auto [first, last] = w.spans[b];
    if (std::none_of(w.grids.begin() + first, w.grids.begin() + last, [](const Grid& grid) { return grid.windowed; })) {
      add_backward_items(w.dense, b, share);
      continue;
    }
    for (int32_t span = first; span < last; ++span) {
      const Grid& grid = w.grids[span];
      if (grid.windowed) {
        add_window_items(w, b, span, heads(w.dense.q), false);
        add_window_items(w, b, span, heads(w.dense.k), true);
      } else {
        add_cut(w.dense, b, grid.begin, grid.end, grid.begin, grid.end);
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

// The tables of a layout and the windows.
struct Windows {
  Tensor cu_seqlens, cu_spans, grid, step;
  std::array<int32_t, 3> window;
  std::array<bool, 3> causal;
};

inline WindowCall window_call(Tensor q, Tensor k, Tensor v, Tensor out, Tensor of_softmax, const Windows& to, float scale) {
  constexpr int64_t kUnbounded = 1 << 30;
  const Tensor& cu = to.cu_seqlens;
  WindowCall w{attention_call(q, k, v, out, of_softmax, cu, cu, Tensor{}, Tensor{}, scale, kUnbounded, kUnbounded, 0), {}, {}, {}};
  if (k.size[0] != q.size[0]) fail(k, "as many tokens as q's " + std::to_string(q.size[0]), shape_of(k));
  at_most(q, 0);  // along an axis, indices of tokens are added to sizes of windows
  spans(to.cu_spans, to.grid, {&to.step}, q.size[0]);
  const int64_t sizes[3] = {to.window[0], to.window[1], to.window[2]};
  if (*std::min_element(sizes, sizes + 3) < 0) fail("window", "sizes >= 0", listed(sizes, sizes + 3));
  return w;
}

inline void add_grids(WindowCall& w, const Windows& to) {
  const int32_t* bounds = to.cu_spans.ints();
  const int32_t count = static_cast<int32_t>(to.grid.size[0]);
  int32_t span = 0;
  for (const Sample& s : w.dense.sample_list) {
    const int64_t end = s.q_start + s.q_size;
    const int32_t first = span;
    for (; span < count && bounds[span + 1] <= end; ++span)
      w.grids.push_back(grid_of(to.grid.ints() + 3 * span, static_cast<const float*>(to.step.data) + 3 * span, to.window, to.causal,
                                bounds[span] - s.q_start, bounds[span + 1] - s.q_start));
    if (bounds[span] != end) fail(to.cu_spans, "a span that ends where a sample does, at " + std::to_string(end), "none");
    w.spans.emplace_back(first, span);
  }
}

inline void bind_spatiotemporal_attention(py::module_& m, const Kernels* kernels) {
  define(m, "spatiotemporal_attention_forward(q, k, v, cu_seqlens, cu_spans, grid, step, window, causal, scale) -> out, statistics",
         [=](const Call& call, Tensor q, Tensor k, Tensor v, Tensor cu, Tensor cu_spans, Tensor grid, Tensor step,
             std::array<int32_t, 3> window, std::array<bool, 3> causal, float scale, Tensor out, Tensor of_softmax) {
           const Windows windows{cu, cu_spans, grid, step, window, causal};
           WindowCall w = window_call(q, k, v, out, of_softmax, windows, scale);
           call.run([&] {
             add_samples(w.dense, cu, cu);
             add_grids(w, windows);
             window_forward_items(w);
             run(w, kernels->attention_forward, kernels->spatiotemporal_attention_forward);
           });
         });
  define(m,
         "spatiotemporal_attention_backward(dout, q, k, v, out, statistics, cu_seqlens, cu_spans, grid, step, window, causal, "
         "scale) -> "
         "dq, dk, dv",
         [=](const Call& call, Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor of_softmax, Tensor cu, Tensor cu_spans,
             Tensor grid, Tensor step, std::array<int32_t, 3> window, std::array<bool, 3> causal, float scale, Tensor dq, Tensor dk,
             Tensor dv) {
           const Windows windows{cu, cu_spans, grid, step, window, causal};
           WindowCall w = window_call(q, k, v, out, of_softmax, windows, scale);
           add_gradients(w.dense, dout, Tensor{}, dq, dk, dv);
           call.run([&] {
             add_samples(w.dense, cu, cu);
             add_grids(w, windows);
             window_backward_items(w);
             run(w, kernels->attention_backward, kernels->spatiotemporal_attention_backward);
           });
         });
}

}  // namespace sora
