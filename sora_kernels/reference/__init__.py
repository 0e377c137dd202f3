"""The oracle: every op in plain torch and einops, readable first, for any device and any float dtype.

Each file holds an op as differentiable functions and, under them, its backend functions: the forward copies into the
outputs it is given, the backward is autograd through the differentiable function, so no gradient is derived by hand.
float64 computes in float64, anything narrower in float32; a result is rounded once, when it is stored.
"""

from .adaln import (
    gate_residual_backward,
    gate_residual_forward,
    gate_residual_layer_norm_modulate_backward,
    gate_residual_layer_norm_modulate_forward,
    layer_norm_modulate_backward,
    layer_norm_modulate_forward,
    norm_gate_residual_backward,
    norm_gate_residual_forward,
)
from .attention import (
    attention_backward,
    attention_forward,
    bias_gradient,
    spatiotemporal_attention_backward,
    spatiotemporal_attention_forward,
)
from .bias_gelu import bias_gelu_backward, bias_gelu_forward
from .block_sparse_attention import block_sparse_attention_backward, block_sparse_attention_forward
from .common import collecting
from .int8_attention import int8_attention_forward
from .norm_rope import apply_rope, norm_rope_backward, norm_rope_forward
from .patch_embed import (
    patch_embed_3d_backward,
    patch_embed_3d_forward,
    patchify_3d,
    unpatchify_3d,
)
from .rope import (
    qk_norm_rope_3d_backward,
    qk_norm_rope_3d_forward,
    rope_3d,
)

__all__ = [
    "apply_rope",
    "attention_backward",
    "attention_forward",
    "bias_gelu_backward",
    "bias_gelu_forward",
    "bias_gradient",
    "block_sparse_attention_backward",
    "block_sparse_attention_forward",
    "collecting",
    "gate_residual_backward",
    "gate_residual_forward",
    "gate_residual_layer_norm_modulate_backward",
    "gate_residual_layer_norm_modulate_forward",
    "int8_attention_forward",
    "layer_norm_modulate_backward",
    "layer_norm_modulate_forward",
    "norm_gate_residual_backward",
    "norm_gate_residual_forward",
    "norm_rope_backward",
    "norm_rope_forward",
    "patch_embed_3d_backward",
    "patch_embed_3d_forward",
    "patchify_3d",
    "qk_norm_rope_3d_backward",
    "qk_norm_rope_3d_forward",
    "rope_3d",
    "spatiotemporal_attention_backward",
    "spatiotemporal_attention_forward",
    "unpatchify_3d",
]
