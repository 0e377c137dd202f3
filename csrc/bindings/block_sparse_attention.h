// Block-sparse attention: decodes and checks the arguments.
#pragma once

#include "../cpu/schedule/blocks.h"
#include "attention.h"

namespace sora {

// A mask as tensors: boundaries of blocks in tokens and of samples in blocks, and lists of the blocks that are seen.
struct BlockTables {
  Tensor cu_blocks_q, cu_blocks_k, cu_samples_q, cu_samples_k, offsets, indices;
};

// Boundaries of samples, the last of which ends with the last block.
inline void check_sample_blocks(const Tensor& cu_samples, const Tensor& cu_blocks) {
  const int64_t blocks = cu_blocks.size[0] - 1;
  boundaries(cu_samples, blocks);
  const int32_t last = cu_samples.ints()[cu_samples.size[0] - 1];
  if (last != blocks) fail(cu_samples, "a last entry of " + std::to_string(blocks), std::to_string(last));
}

// Lists for `num_heads` heads, or one for all, of the blocks of each sample: of others of the same sample, which rise.
inline BlockLists block_lists(const Tensor& offsets, const Tensor& indices, int64_t num_heads, const Tensor& own,
                              const Tensor& met) {
  const int64_t blocks = own.ints()[own.size[0] - 1];
  boundaries(offsets, indices.size[0]);
  rank(indices, 1, "[entries]"), dtype(indices, DType::kInt32), contiguous(indices);
  const int64_t lists = offsets.size[0] - 1;
  const bool shared = lists == blocks;
  if (!shared && lists != num_heads * blocks)
    fail(offsets, std::to_string(blocks + 1) + " or " + std::to_string(num_heads * blocks + 1) + " entries", shape_of(offsets));
  int64_t sample = 0;
  for (int64_t list = 0; list < lists; ++list) {
    const int64_t block = list % blocks;
    if (block == 0) sample = 0;
    while (own.ints()[sample + 1] <= block) ++sample;
    int64_t least = met.ints()[sample];
    const int64_t end = met.ints()[sample + 1];
    for (int32_t n = offsets.ints()[list]; n < offsets.ints()[list + 1]; ++n) {
      const int32_t index = indices.ints()[n];
      if (index < least || index >= end)
        fail(indices,
             "blocks below " + std::to_string(end) + " of the sample of block " + std::to_string(block) + ", from " +
                 std::to_string(least) + " on, that rise",
             std::to_string(index));
      least = int64_t{index} + 1;
    }
  }
  return {offsets.ints(), indices.ints(), shared};
}

inline BlockCall block_call(Tensor q, Tensor k, Tensor v, Tensor out, Tensor statistics, const BlockTables& tables, float scale) {
  constexpr int64_t kUnbounded = 1 << 30;
  BlockCall call;
  AttentionCall& a = call.dense;
  boundaries(tables.cu_blocks_q, q.ndim > 0 ? q.size[0] : 0), boundaries(tables.cu_blocks_k, k.ndim > 0 ? k.size[0] : 0);
  check_sample_blocks(tables.cu_samples_q, tables.cu_blocks_q), check_sample_blocks(tables.cu_samples_k, tables.cu_blocks_k);
  same_shape(tables.cu_samples_k, tables.cu_samples_q);
  a.q = q, a.k = k, a.v = v, a.out = out, a.scale = scale, a.left = a.right = kUnbounded;
  check_attention(a, statistics, tables.cu_samples_q, tables.cu_samples_k);
  call.blocks.cu_q = tables.cu_blocks_q.ints(), call.blocks.cu_k = tables.cu_blocks_k.ints();
  call.blocks.blocks_q = static_cast<int32_t>(tables.cu_blocks_q.size[0] - 1);
  call.blocks.blocks_k = static_cast<int32_t>(tables.cu_blocks_k.size[0] - 1);
  call.blocks.of_queries = block_lists(tables.offsets, tables.indices, heads(q), tables.cu_samples_q, tables.cu_samples_k);
  a.q_used = call.blocks.cu_q[call.blocks.blocks_q], a.k_used = call.blocks.cu_k[call.blocks.blocks_k];
  return call;
}

// The packed batch as one sample, to which the blocks' tokens belong.
inline void add_one_sample(AttentionCall& a) {
  a.sample_list.push_back({0, 0, 0, 0, a.q.size[0], a.k.size[0]});
  a.samples = a.sample_list.data();
}

inline void bind_block_sparse_attention(py::module_& m, const Kernels* kernels) {
  define(m,
         "block_sparse_attention_forward(q, k, v, cu_blocks_q, cu_blocks_k, cu_samples_q, cu_samples_k, offsets, indices, block_q, "
         "block_k, scale) -> out, lse, statistics",
         [=](const Call& c, Tensor q, Tensor k, Tensor v, Tensor cu_blocks_q, Tensor cu_blocks_k, Tensor cu_samples_q,
             Tensor cu_samples_k, Tensor offsets, Tensor indices, int64_t, int64_t, float scale, Tensor out, Tensor lse,
             Tensor statistics) {
           const BlockTables tables{cu_blocks_q, cu_blocks_k, cu_samples_q, cu_samples_k, offsets, indices};
           BlockCall call = block_call(q, k, v, out, statistics, tables, scale);
           float_table(lse, {q.size[1], q.size[0]});
           call.dense.lse = lse;
           c.run([&] {
             add_one_sample(call.dense);
             add_block_items(call, cu_samples_q, false);
             run(call, kernels->block_sparse_attention_forward);
           });
         });
  define(m,
         "block_sparse_attention_backward(dout, dlse?, q, k, v, out, statistics, cu_blocks_q, cu_blocks_k, cu_samples_q, "
         "cu_samples_k, offsets, indices, key_offsets, key_indices, block_q, block_k, scale) -> dq, dk, dv",
         [=](const Call& c, Tensor dout, Tensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor statistics,
             Tensor cu_blocks_q, Tensor cu_blocks_k, Tensor cu_samples_q, Tensor cu_samples_k, Tensor offsets, Tensor indices,
             Tensor key_offsets, Tensor key_indices, int64_t, int64_t, float scale, Tensor dq, Tensor dk, Tensor dv) {
           const BlockTables tables{cu_blocks_q, cu_blocks_k, cu_samples_q, cu_samples_k, offsets, indices};
           BlockCall call = block_call(q, k, v, out, statistics, tables, scale);
           call.blocks.of_keys = block_lists(key_offsets, key_indices, heads(q), cu_samples_k, cu_samples_q);
           add_gradients(call.dense, dout, dlse, dq, dk, dv);
           c.run([&] {
             add_one_sample(call.dense);
             add_block_items(call, cu_samples_q, false);
             add_block_items(call, cu_samples_k, true);
             run(call, kernels->block_sparse_attention_backward);
           });
         });
}

}  // namespace sora
