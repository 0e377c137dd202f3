"""What the families share: adaLN, norms, rotation and GELU, with the modules and tables that diffusers has."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.normalization import FP32LayerNorm, RMSNorm
from torch import Tensor, nn

from ...adaln import gate_residual, gate_residual_layer_norm_modulate, layer_norm_modulate
from ...bias_gelu import bias_gelu
from ...norm_rope import apply_rope, norm_rope

_LAYER_NORMS = nn.LayerNorm, FP32LayerNorm
_RMS_NORMS = nn.RMSNorm, RMSNorm
Tables = tuple[Tensor, Tensor]


def is_plain(module: nn.Module) -> bool:
    """Whether nothing depends on this module being called: no hook, offloading or cast sits on it."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def is_norm(module: nn.Module | None) -> bool:
    """Whether a kernel can take this norm over. Identity or None is no norm at all, which is as easy."""
    if module is None:
        return True
    kind = type(module)
    known = kind is nn.Identity or kind in _LAYER_NORMS or (kind in _RMS_NORMS and getattr(module, "bias", None) is None)
    return known and is_plain(module)


def unless_watched(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Of a forward that takes over the norms of these names: where a kernel cannot, the module's own forward runs."""

    def decorate(forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def chosen(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if all(is_norm(getattr(self, name)) for name in names):
                return forward(self, *args, **kwargs)
            return type(self).forward(self, *args, **kwargs)

        return chosen

    return decorate


def _norm(module: Any) -> dict[str, Any]:
    """A norm as adaLN's arguments. torch's RMSNorm has a default eps that depends on the dtype."""
    if type(module) in _LAYER_NORMS:
        return {"norm": "layer", "weight": module.weight, "bias": module.bias, "eps": module.eps}
    eps = torch.finfo(torch.float32).eps if module.eps is None else module.eps
    return {"norm": "rms", "weight": module.weight, "eps": eps}


def _rows(x: Tensor, *rows: Tensor | None) -> list[Tensor | None]:
    """Rows that autocast has left in fewer bits than x."""
    return [r if r is None or r.dtype in (x.dtype, torch.float32) else r.to(x.dtype) for r in rows]


def modulate(norm: nn.Module, x: Tensor, shift: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """norm(x) * (1 + scale) + shift."""
    shift, scale = _rows(x, shift, scale)
    return layer_norm_modulate(x, shift, scale, **_norm(norm))


def gate(residual: Tensor, x: Tensor, gate: Tensor | None = None) -> Tensor:
    """residual + gate * x, in the residual's dtype."""
    return gate_residual(residual, x.to(residual.dtype) if residual.dtype != torch.float32 else x, *_rows(x, gate))


def gate_modulate(
    norm: nn.Module,
    residual: Tensor,
    x: Tensor,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(residual, y): residual <- residual + gate * x; y = norm(residual) * (1 + scale) + shift."""
    x = x.to(residual.dtype)
    if type(norm) is nn.Identity:
        residual = gate_residual(residual, x, *_rows(x, gate))
        return residual, residual
    return gate_residual_layer_norm_modulate(residual, x, *_rows(x, gate, shift, scale), **_norm(norm))  # type: ignore[arg-type]


def normed_rotated(norm: nn.Module | None, x: Tensor, tables: Tables | None, across_heads: bool = False, **options: Any) -> Tensor:
    """Queries or keys [B, S, H, d] behind their norm, of each head or across heads, and rotated by cos and sin, if there are any.

    The tables are [N, r/2] or [N, H, r/2]; an option of `apply_rope` is `interleaved`.
    """
    if not is_norm(norm):
        x, norm = norm(x.flatten(2)).view_as(x) if across_heads else norm(x), None  # type: ignore[misc]
    cos, sin = (None, None) if tables is None else _rows(x, *tables)
    if norm is None or type(norm) is nn.Identity:
        return x if cos is None or sin is None else apply_rope(x, cos, sin, **options)
    return norm_rope(x, cos, sin, across_heads=across_heads, **_norm(norm), **options)


def attend(processor: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    """Attention of [B, S, H, d] by the backend that the processor has been given -> [B, S, H * d].

    "sora_varlen" knows masks of keys only; others go to "sora".
    """
    backend = processor._attention_backend
    if backend == "sora_varlen" and mask is not None and not is_of_keys(mask):
        backend = AttentionBackendName("sora")
    out = dispatch_attention_fn(query, key, value, attn_mask=mask, backend=backend, **options)
    return out.flatten(2, 3)


def is_of_keys(mask: Tensor) -> bool:
    """Whether a mask is bool, and the same for all heads and queries."""
    return mask.dtype == torch.bool and (mask.ndim == 2 or all(n == 1 for n in mask.shape[1:-1]))


def text_keys(mask: Tensor | None) -> Tensor | None:
    """LTX's mask of text [B, Sk], 1 where a token counts, as one of keys [B, 1, 1, Sk].

    diffusers adds -10,000 to the scores of the others. That leaves them nothing, except in a sample where all are masked: there it
    changes nothing.
    """
    if mask is None or mask.ndim != 2:
        return mask
    keys = mask == 1
    return (keys | ~keys.any(dim=1, keepdim=True))[:, None, None]


def mask_of_heads(mask: Tensor | None, batch: int, heads: int) -> Tensor | None:
    """A mask [B, 1 or S, Sk], or [B*H, 1 or S, Sk], with an axis of heads."""
    if mask is None or mask.ndim == 4:
        return mask
    return mask[:, None] if mask.shape[0] == batch else mask.unflatten(0, (batch, heads))


class Processor:
    """An attention processor as diffusers expects one; `set_attention_backend` replaces the backend."""

    _attention_backend: Any = AttentionBackendName("sora_varlen")
    _parallel_config: Any = None


def gelu(self: Any, hidden_states: Tensor) -> Tensor:
    """Of diffusers' GELU: its linear layer, and the tanh approximation."""
    hidden_states = self.proj(hidden_states)
    return bias_gelu(hidden_states) if self.approximate == "tanh" else self.gelu(hidden_states)
