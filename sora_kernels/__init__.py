"""Fused kernels for spatiotemporal attention over packed sequences of mixed image and video sizes.

Every public name can be imported from here, each a drop-in where a standard exists:

    from sora_kernels import PackedLayout, flash_attn_varlen_func, rope_3d, use_backend

It is loaded when it is first asked for: `import sora_kernels` alone does not even import torch.

Letters used everywhere: N tokens, B samples, S spans, R modulation rows, F latent frames, H heads, d head dim, D model dim,
C channels, (T, H, W) the token grid, (pt, ph, pw) a patch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# The module that defines each public name.
_PUBLIC = {
    name: module
    for module, names in {
        "adaln": ("gate_residual", "gate_residual_layer_norm_modulate", "layer_norm_modulate", "norm_gate_residual"),
        "attention": (
            "flash_attn_func",
            "flash_attn_kvpacked_func",
            "flash_attn_qkvpacked_func",
            "flash_attn_varlen_func",
            "flash_attn_varlen_kvpacked_func",
            "flash_attn_varlen_qkvpacked_func",
        ),
        "block_mask": ("BlockMask",),
        "block_sparse_attention": ("block_sparse_attention",),
        "backends": ("forced_backend", "prefer", "record", "use_backend"),
        "bias_gelu": ("bias_gelu",),
        "int8_attention": ("int8_attention",),
        "kv_cache": ("flash_attn_with_kvcache",),
        "layout": ("PackedLayout", "Span"),
        "memory": ("cache_limit", "cached_bytes", "empty_cache"),
        "norm_rope": ("apply_rope", "norm_rope"),
        "patch_embed": ("patch_embed_3d", "patchify_3d", "unpatchify_3d"),
        "rope": ("default_axes_dim", "qk_norm_rope_3d", "rope_3d"),
        "spatiotemporal_attention": ("spatiotemporal_attention",),
        "token_blocks": ("TokenBlocks",),
        "torch_attention": ("scaled_dot_product_attention", "varlen_attn"),
    }.items()
    for name in names
}
__all__ = sorted(_PUBLIC)

if TYPE_CHECKING:
    from .adaln import gate_residual as gate_residual
    from .adaln import gate_residual_layer_norm_modulate as gate_residual_layer_norm_modulate
    from .adaln import layer_norm_modulate as layer_norm_modulate
    from .adaln import norm_gate_residual as norm_gate_residual
    from .attention import flash_attn_func as flash_attn_func
    from .attention import flash_attn_kvpacked_func as flash_attn_kvpacked_func
    from .attention import flash_attn_qkvpacked_func as flash_attn_qkvpacked_func
    from .attention import flash_attn_varlen_func as flash_attn_varlen_func
    from .attention import flash_attn_varlen_kvpacked_func as flash_attn_varlen_kvpacked_func
    from .attention import flash_attn_varlen_qkvpacked_func as flash_attn_varlen_qkvpacked_func
    from .backends import forced_backend as forced_backend
    from .backends import prefer as prefer
    from .backends import record as record
    from .backends import use_backend as use_backend
    from .bias_gelu import bias_gelu as bias_gelu
    from .block_mask import BlockMask as BlockMask
    from .block_sparse_attention import block_sparse_attention as block_sparse_attention
    from .int8_attention import int8_attention as int8_attention
    from .kv_cache import flash_attn_with_kvcache as flash_attn_with_kvcache
    from .layout import PackedLayout as PackedLayout
    from .layout import Span as Span
    from .memory import cache_limit as cache_limit
    from .memory import cached_bytes as cached_bytes
    from .memory import empty_cache as empty_cache
    from .norm_rope import apply_rope as apply_rope
    from .norm_rope import norm_rope as norm_rope
    from .patch_embed import patch_embed_3d as patch_embed_3d
    from .patch_embed import patchify_3d as patchify_3d
    from .patch_embed import unpatchify_3d as unpatchify_3d
    from .rope import default_axes_dim as default_axes_dim
    from .rope import qk_norm_rope_3d as qk_norm_rope_3d
    from .rope import rope_3d as rope_3d
    from .spatiotemporal_attention import spatiotemporal_attention as spatiotemporal_attention
    from .token_blocks import TokenBlocks as TokenBlocks
    from .torch_attention import scaled_dot_product_attention as scaled_dot_product_attention
    from .torch_attention import varlen_attn as varlen_attn


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Five functions have the names of their modules, which the import system would put in their place."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
