// What the bindings and the kernels share: the arguments of each op, checked and decoded, and the table of one tier's entry points.
#pragma once

#include <cstdint>

#include "../arguments.h"

namespace sora {

// Where the queries and keys of one sample are, in a packed tensor or a dense one.
struct Sample {
  int64_t q_start, k_start;  // first token (packed) or 0 (dense)
  int64_t q_batch, k_batch;  // 0 (packed) or the batch index (dense)
  int64_t q_size, k_size;
  int32_t first_span;  // windowed: its first span that holds tokens
};

// A piece of attention on one sample: some consecutive queries of a head (forward), or pairs of some queries and keys of a key head
// and its query heads (backward), for dQ of these queries, dK and dV of these keys, or both.
struct AttentionItem {
  int32_t sample, head;
  int64_t q_begin, q_end, k_begin, k_end;
  bool queries, keys;
  double work() const { return double(q_end - q_begin) * double(k_end - k_begin); }
};

struct Attention {
  Tensor q, k, v, out, lse;
  Tensor dout, dlse, dq, dk, dv;  // backward only
  Tensor bias, alibi;
  float scale, softcap;
  int64_t left, right;
  // Space-time windows.
  bool windowed;
  Tensor cu_spans, grid, step;
  int32_t window[3];
  bool causal[3];

  const Sample* samples;
  const AttentionItem* items;
  int64_t num_items;
  int64_t q_used, k_used;  // tokens inside the boundaries; the rest are slack
};
constexpr int kQueryBlock = 1024;  // queries of a forward item, at most

struct Kernels {
  const char* name;
  int vector_bytes;
  void (*attention_forward)(const Attention&);
  void (*attention_backward)(const Attention&);
  void (*rope_3d)(const Rope&, const Tensor& x, const Tensor& out);
  void (*qk_norm_rope_3d_forward)(const Rope&, QkNorm (&)[2], bool across_heads, float eps);
  void (*qk_norm_rope_3d_backward)(const Rope&, QkNorm (&)[2], bool across_heads);
  void (*layer_norm_modulate_forward)(const AdaLn&);
  void (*gate_residual_forward)(const AdaLn&);
  void (*gate_residual_layer_norm_modulate_forward)(const AdaLn&);
  void (*adaln_backward)(const AdaLn&);  // of all three
  void (*patch_embed_3d_forward)(const PatchEmbed&);
  void (*patch_embed_3d_backward)(const PatchEmbed&);
  void (*patchify_3d)(const PatchEmbed&);
  void (*unpatchify_3d)(const PatchEmbed&);
  float (*multiply_adds)(int64_t items, double operations);
};

}  // namespace sora
