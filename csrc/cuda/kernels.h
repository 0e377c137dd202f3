// The entry points of the kernels. Each queues its work on the framework's current stream and returns.
#pragma once

#include "../arguments.h"

namespace sora::cuda {

void rope_3d(const Rope&, const Tensor& x, const Tensor& out);
void qk_norm_rope_3d_forward(const Rope&, QkNorm (&)[2], bool across_heads, float eps);
void qk_norm_rope_3d_backward(const Rope&, QkNorm (&)[2], bool across_heads);
void layer_norm_modulate_forward(const AdaLn&);
void gate_residual_forward(const AdaLn&);
void gate_residual_layer_norm_modulate_forward(const AdaLn&);
void adaln_backward(const AdaLn&);  // of all three
void bias_gelu_forward(const BiasGelu&);
void bias_gelu_backward(const BiasGelu&);
void patchify_3d(const PatchEmbed&);
void unpatchify_3d(const PatchEmbed&);

}  // namespace sora::cuda
