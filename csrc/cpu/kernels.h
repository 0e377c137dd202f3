// What the bindings and the kernels share: the arguments of each op, checked and decoded, and the table of one tier's entry points.
#pragma once

#include <cstdint>
#include <new>

#include "../kernels.h"

namespace sora {

// A kernel cannot have the memory that it needs besides its outputs: Python's MemoryError. Tiers throw it by no_memory, which
// bindings.cpp defines, so that none of its code is in a tier.
class NoMemory : public std::bad_alloc {
 public:
  explicit NoMemory(int64_t bytes);
  const char* what() const noexcept override;
  const int64_t bytes;

 private:
  char text_[80];
};
[[noreturn]] void no_memory(int64_t bytes);

// What a matrix product may have of rows, columns or depth: kernels count them times those of a block in 32 bits.
constexpr int64_t kMaxProduct = int64_t{1} << 22;

// Where the queries and keys of one sample are, in a packed tensor or a dense one.
struct Sample {
  int64_t q_start, k_start;  // first token (packed) or 0 (dense)
  int64_t q_batch, k_batch;  // 0 (packed) or the batch index (dense)
  int64_t q_size, k_size;
};

// Items of some kinds of attention are stacks of panels: cpu/stack.h.
constexpr int kStackPanel = 64;   // tokens of a panel, at most
constexpr int kStackPanels = 32;  // of a stack, at most

// A piece of attention on one sample. Forward, some consecutive queries of a head. Backward, some queries and some keys of a key
// head and its query heads: for dQ of the queries, for dK and dV of the keys, or for both.
struct AttentionItem {
  int32_t sample, head;
  int64_t q_begin, q_end, k_begin, k_end;
  bool queries, keys;
  double work() const { return double(q_end - q_begin) * double(k_end - k_begin); }
};

struct Attention {
  Tensor q, k, v, out;
  Tensor maximum, sum;            // of the softmax, a number per query: of the scores before `scale` where that is all there is
  Tensor lse;                     // forward only, and may be absent
  Tensor dout, dlse, dq, dk, dv;  // backward only
  Tensor bias, alibi;
  float scale, softcap;
  int64_t left, right;

  const Sample* samples;
  const AttentionItem* items;
  int64_t num_items;
  int64_t q_used, k_used;  // tokens inside the boundaries; the rest are slack
};
constexpr int kQueryBlock = 1024;  // queries of a forward item, at most

struct Interval {
  int32_t begin, end;
};
struct Box {
  Interval axis[3];
};

struct Axis {
  int32_t size, window;
  bool causal;
  int64_t stride;  // tokens from one index to the next
};

// A span's grid with windows. Its axes are in the order in which it is walked. An item is a box of it, cut into panels along the
// first two axes.
struct SpanGrid {
  bool windowed;       // or else its tokens see all of their sample
  int64_t begin, end;  // tokens of the sample
  Axis axis[3];
  int32_t edge[3];  // of a panel
  int32_t planes;   // indices of the first axis that are walked together
};
constexpr int kOuterPanels = 4, kMiddlePanels = 8;  // of an item, at most

// A piece of windowed attention: a box of a span's grid. It is of the queries of a head, forward and for dQ, or of the keys of a
// key head, for dK and dV.
struct WindowItem {
  int32_t sample, head, span;
  bool keys;
  Box box;
  double pairs;  // of queries and keys
  double work() const { return pairs; }
};

struct SpatiotemporalAttention {
  Attention attention;    // its items: of spans that see all of their samples
  const SpanGrid* grids;  // of the spans
  const WindowItem* items;
  int64_t num_items;
};

// The numbers of blocks that each block sees, of all blocks of a head after those of the one before: those of block n of head h are
// indices[offsets[h * blocks + n]] to indices[offsets[h * blocks + n + 1]], and rise.
struct BlockLists {
  const int32_t *offsets, *indices;
  bool shared;  // one head's lists hold for all
};

// A piece of block-sparse attention: panels of the blocks of a sample, from the one that begins at a token of a block on.
struct BlockItem {
  int32_t head, block, panels;
  bool keys;
  int64_t token;
  double pairs;
  double work() const { return pairs; }
};

struct BlockSparseAttention {
  Attention attention;         // without items; the packed batch is one sample to it
  const int32_t *cu_q, *cu_k;  // tokens of blocks
  int32_t blocks_q, blocks_k;
  BlockLists of_queries, of_keys;
  const BlockItem* items;
  int64_t num_items;
};

// Entry points as lists; see csrc/kernels.h. The first list is of the ops that multiply matrices: tier amx has these alone.
#define SORA_PRODUCT_KERNELS(X)                                                \
  X(void, block_sparse_attention_forward, (const BlockSparseAttention&))       \
  X(void, block_sparse_attention_backward, (const BlockSparseAttention&))      \
  X(void, attention_forward, (const Attention&))                               \
  X(void, attention_backward, (const Attention&))                              \
  X(void, spatiotemporal_attention_forward, (const SpatiotemporalAttention&))  \
  X(void, spatiotemporal_attention_backward, (const SpatiotemporalAttention&)) \
  X(void, patch_embed_3d_forward, (const PatchEmbed&))                         \
  X(void, patch_embed_3d_backward, (const PatchEmbed&))
#define SORA_KERNELS(X)   \
  SORA_PRODUCT_KERNELS(X) \
  SORA_SHARED_KERNELS(X)  \
  X(float, multiply_adds, (int64_t items, double operations))

// A tier's entry points.
struct Kernels {
  const char* name;
  SORA_KERNELS(SORA_POINTER)
};

}  // namespace sora
