// Block-sparse attention: how blocks are stacked into items for threads.
//
// Cost model: an item costs as many units as it has pairs of a query and a key. An item has as many panels as fit into a core's
// cache, counted from the first of its sample, whatever the number of threads: what is met together is summed together.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "attention.h"

namespace sora {

struct BlockCall {
  AttentionCall dense{};
  BlockSparseAttention blocks{};
  std::vector<BlockItem> items;
};

inline int64_t panels_of(const int32_t* cu, int32_t block) { return (cu[block + 1] - cu[block] + kStackPanel - 1) / kStackPanel; }

// How many tokens the panels of a block meet: of query head `head`.
inline double tokens_met(const BlockLists& lists, int32_t blocks, int32_t head, int32_t block, const int32_t* met) {
  const int32_t* offsets = lists.offsets + (lists.shared ? 0 : int64_t{head} * blocks) + block;
  double tokens = 0;
  for (int32_t n = offsets[0]; n < offsets[1]; ++n) tokens += met[lists.indices[n] + 1] - met[lists.indices[n]];
  return tokens;
}

// Items of the blocks of each sample: of queries, or of keys.
inline void add_block_items(BlockCall& call, const Tensor& cu_samples, bool keys) {
  const BlockSparseAttention& b = call.blocks;
  const AttentionCall& a = call.dense;
  const int32_t *own = keys ? b.cu_k : b.cu_q, *met = keys ? b.cu_q : b.cu_k, *samples = cu_samples.ints();
  const BlockLists& lists = keys ? b.of_keys : b.of_queries;
  const int32_t blocks = keys ? b.blocks_k : b.blocks_q, group = heads(a.q) / std::max(heads(a.k), 1);
  const int32_t most = static_cast<int32_t>(std::clamp<int64_t>((int64_t{1} << 18) / a.q.size[2] / kStackPanel, 1, kStackPanels));
  for (int32_t head = 0; head < heads(keys ? a.k : a.q); ++head)
    for (int64_t sample = 0; sample + 1 < cu_samples.size[0]; ++sample) {
      BlockItem item{head, 0, 0, keys, 0, 0};
      for (int32_t block = samples[sample]; block < samples[sample + 1]; ++block) {
        double tokens = 0;
        for (int32_t g = 0; g < (keys ? group : 1); ++g)
          tokens += tokens_met(lists, blocks, keys ? head * group + g : head, block, met);
        for (int64_t token = own[block]; token < own[block + 1]; token += kStackPanel) {
          if (item.panels == 0) item.block = block, item.token = token;
          item.pairs += tokens * std::min<int64_t>(own[block + 1] - token, kStackPanel);
          if (++item.panels < most) continue;
          call.items.push_back(item);
          item.panels = 0, item.pairs = 0;
        }
      }
      if (item.panels > 0) call.items.push_back(item);
    }
}

inline void run(BlockCall& call, void (*kernel)(const BlockSparseAttention&)) {
  call.blocks.attention = call.dense;
  longest_first(call.items, call.blocks.items, call.blocks.num_items);
  kernel(call.blocks);
}

}  // namespace sora
