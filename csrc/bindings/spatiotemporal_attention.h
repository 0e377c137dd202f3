// Attention through windows in space and time: decodes and checks the arguments.
#pragma once

#include "../cpu/schedule/windows.h"
#include "attention.h"

namespace sora {

// The tables of a layout and the windows.
struct Windows {
  Tensor cu_seqlens, cu_spans, grid, step;
  std::array<int32_t, 3> window;
  std::array<bool, 3> causal;
};

inline WindowCall window_call(Tensor q, Tensor k, Tensor v, Tensor out, Tensor statistics, const Windows& to, float scale) {
  constexpr int64_t kUnbounded = 1 << 30;
  WindowCall w;
  w.dense =
      attention_call(q, k, v, out, statistics, to.cu_seqlens, to.cu_seqlens, Tensor{}, Tensor{}, scale, kUnbounded, kUnbounded, 0);
  if (k.size[0] != q.size[0]) fail(k, "as many tokens as q's " + std::to_string(q.size[0]), shape_of(k));
  at_most(q, 0);  // along an axis, indices of tokens are added to sizes of windows
  spans(to.cu_spans, to.grid, {&to.step}, q.size[0]);
  const int64_t sizes[3] = {to.window[0], to.window[1], to.window[2]};
  if (*std::min_element(sizes, sizes + 3) < 0) fail("window", "sizes >= 0", listed(sizes, sizes + 3));
  return w;
}

// The grid of each span, and which spans are a sample's.
inline void add_grids(WindowCall& w, const Windows& to) {
  const int32_t* bounds = to.cu_spans.ints();
  const int32_t count = static_cast<int32_t>(to.grid.size[0]);
  int32_t span = 0;
  for (const Sample& s : w.dense.sample_list) {
    const int64_t end = s.q_start + s.q_size;
    const int32_t first = span;
    for (; span < count && bounds[span + 1] <= end; ++span)
      w.grids.push_back(span_grid(to.grid.ints() + 3 * span, static_cast<const float*>(to.step.data) + 3 * span, to.window,
                                  to.causal, bounds[span] - s.q_start, bounds[span + 1] - s.q_start));
    if (bounds[span] != end) fail(to.cu_spans, "a span that ends where a sample does, at " + std::to_string(end), "none");
    w.spans.emplace_back(first, span);
  }
}

inline void bind_spatiotemporal_attention(py::module_& m, const Kernels* kernels) {
  define(m, "spatiotemporal_attention_forward(q, k, v, cu_seqlens, cu_spans, grid, step, window, causal, scale) -> out, statistics",
         [=](const Call& call, Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor cu_spans, Tensor grid, Tensor step,
             std::array<int32_t, 3> window, std::array<bool, 3> causal, float scale, Tensor out, Tensor statistics) {
           const Windows windows{cu_seqlens, cu_spans, grid, step, window, causal};
           WindowCall w = window_call(q, k, v, out, statistics, windows, scale);
           call.run([&] {
             add_samples(w.dense, cu_seqlens, cu_seqlens);
             add_grids(w, windows);
             schedule_forward(w);
             run(w, kernels->attention_forward, kernels->spatiotemporal_attention_forward);
           });
         });
  define(m,
         "spatiotemporal_attention_backward(dout, q, k, v, out, statistics, cu_seqlens, cu_spans, grid, step, window, causal, "
         "scale) -> dq, dk, dv",
         [=](const Call& call, Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor statistics, Tensor cu_seqlens,
             Tensor cu_spans, Tensor grid, Tensor step, std::array<int32_t, 3> window, std::array<bool, 3> causal, float scale,
             Tensor dq, Tensor dk, Tensor dv) {
           const Windows windows{cu_seqlens, cu_spans, grid, step, window, causal};
           WindowCall w = window_call(q, k, v, out, statistics, windows, scale);
           add_gradients(w.dense, dout, Tensor{}, dq, dk, dv);
           call.run([&] {
             add_samples(w.dense, cu_seqlens, cu_seqlens);
             add_grids(w, windows);
             schedule_backward(w);
             run(w, kernels->attention_backward, kernels->spatiotemporal_attention_backward);
           });
         });
}

}  // namespace sora
