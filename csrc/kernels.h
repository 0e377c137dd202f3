// The entry points of the kernels that both compiled modules have.
//
// A list of entry points is a macro of X(result, name, arguments) for each. Declarations and tables of pointers are made from it,
// so an entry point is written once.
#pragma once

#include "arguments.h"

#define SORA_SHARED_KERNELS(X)                                                                     \
  X(void, rope_3d, (const Rope&, const Tensor& x, const Tensor& out))                              \
  X(void, qk_norm_rope_3d_forward, (const Rope&, QkNorm(&parts)[2], bool across_heads, float eps)) \
  X(void, qk_norm_rope_3d_backward, (const Rope&, QkNorm(&parts)[2], bool across_heads))           \
  X(void, apply_rope, (const RopeTables&, const Tensor& x, const Tensor& out))                     \
  X(void, norm_rope_forward, (const NormRope&))                                                    \
  X(void, norm_rope_backward, (const NormRope&))                                                   \
  X(void, layer_norm_modulate_forward, (const AdaLn&))                                             \
  X(void, gate_residual_forward, (const AdaLn&))                                                   \
  X(void, gate_residual_layer_norm_modulate_forward, (const AdaLn&))                               \
  X(void, norm_gate_residual_forward, (const AdaLn&))                                              \
  X(void, adaln_backward, (const AdaLn&)) /* of all four */                                        \
  X(void, bias_gelu_forward, (const BiasGelu&))                                                    \
  X(void, bias_gelu_backward, (const BiasGelu&))                                                   \
  X(void, patchify_3d, (const PatchEmbed&))                                                        \
  X(void, unpatchify_3d, (const PatchEmbed&))

// What is made of an entry point: its declaration, and its pointer in a table.
#define SORA_DECLARE(result, name, arguments) result name arguments;
#define SORA_POINTER(result, name, arguments) result(*name) arguments;
#define SORA_ADDRESS(result, name, arguments) name,
