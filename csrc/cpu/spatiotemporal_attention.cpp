// Attention through windows in space and time, forward: of the spans that do not see all of their samples; the others are
// attention.cpp's.
//
// An item is a stack of panels of queries of one head; window.h says which keys it meets in which order. What a query sees does not
// depend on its item or on what its sample is packed with, and nor does the order in which it is summed.
#include "stack_forward.h"
#include "window.h"

namespace sora::SORA_TIER {

void spatiotemporal_attention_forward(const SpatiotemporalAttention& w) {
  dispatch(w.attention.q.dtype, [&](auto t) {
    parallel_for(w.num_items, [&](int64_t i) {
      const WindowItem& item = w.items[i];
      stack_forward<decltype(t)>(w.attention, w.attention.samples[item.sample], item.head, WindowStack(w, item));
    });
  });
}

}  // namespace sora::SORA_TIER
