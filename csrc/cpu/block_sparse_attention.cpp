// Block-sparse attention, forward.
//
// An item is a stack of panels of neighbouring blocks of queries of one head; blocks.h says which keys it meets in which order.
// Stacks count from a sample's first block, so that a result does not depend on what a sample is packed with.
#include "blocks.h"
#include "stack_forward.h"

namespace sora::SORA_TIER {

void block_sparse_attention_forward(const BlockSparseAttention& b) {
  dispatch(b.attention.q.dtype, [&](auto t) {
    parallel_for(b.num_items, [&](int64_t i) {
      stack_forward<decltype(t)>(b.attention, *b.attention.samples, b.items[i].head, BlockStack(b, b.items[i]));
    });
    zero_query_slack<decltype(t)>(b.attention);
  });
}

}  // namespace sora::SORA_TIER
