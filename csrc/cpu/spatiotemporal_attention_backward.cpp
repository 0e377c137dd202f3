// Attention through windows in space and time, backward: of the spans that do not see all of their samples; the others are
// attention_backward.cpp's.
//
// An item is a stack of panels of queries, for their dQ, or of keys, for their dK and dV: see stack_backward.h.
#include "stack_backward.h"
#include "window.h"

namespace sora::SORA_TIER {

void spatiotemporal_attention_backward(const SpatiotemporalAttention& w) {
  dispatch(w.attention.q.dtype, [&](auto t) {
    parallel_for(w.num_items, [&](int64_t i) {
      const WindowItem& item = w.items[i];
      const WindowStack stack(w, item);
      stack_backward<decltype(t)>(w.attention, w.attention.samples[item.sample], item.head, item.keys, stack);
    });
  });
}

}  // namespace sora::SORA_TIER
