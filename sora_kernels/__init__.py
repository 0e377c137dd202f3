"""Fused kernels for spatiotemporal attention over packed sequences of mixed image and video sizes.

One import per op family, each a drop-in where a standard exists:

    from sora_kernels.layout import PackedLayout
    from sora_kernels.attention import flash_attn_varlen_func, spatiotemporal_attention
    from sora_kernels.rope import rope_3d, qk_norm_rope_3d
    from sora_kernels.adaln import layer_norm_modulate, gate_residual_layer_norm_modulate
    from sora_kernels.bias_gelu import bias_gelu
    from sora_kernels.patch_embed import patch_embed_3d, unpatchify_3d

Letters used everywhere: N tokens, B samples, S spans, R modulation rows, F latent frames, H heads, d head dim, D model dim,
C channels, (T, H, W) the token grid, (pt, ph, pw) a patch.
"""

__version__ = "0.1.0"
