// Block-sparse attention, backward.
//
// An item is a stack of panels of neighbouring blocks: of queries, for their dQ, or of keys, for their dK and dV. See
// stack_backward.h.
#include "blocks.h"
#include "stack_backward.h"

namespace sora::SORA_TIER {

void block_sparse_attention_backward(const BlockSparseAttention& b) {
  const Attention& a = b.attention;
  dispatch(a.q.dtype, [&](auto t) {
    using T = decltype(t);
    parallel_for(b.num_items, [&](int64_t i) {
      const BlockItem& item = b.items[i];
      const BlockStack stack(b, item);
      stack_backward<T>(a, *a.samples, item.head, item.keys, stack);
    });
    zero_slack<T>(a.dq, a.q_used);
    zero_slack<T>(a.dk, a.k_used);
    zero_slack<T>(a.dv, a.k_used);
  });
}

}  // namespace sora::SORA_TIER
