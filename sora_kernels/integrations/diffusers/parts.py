"""What the families share: adaLN, norms, rotation and GELU, with the modules and tables that diffusers has."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.normalization import FP32LayerNorm, MochiRMSNorm, RMSNorm
from torch import Tensor, nn

from ...adaln import gate_residual, gate_residual_layer_norm_modulate, layer_norm_modulate, norm_gate_residual
from ...bias_gelu import bias_gelu
from ...norm_rope import apply_rope, norm_rope

_LAYER_NORMS = nn.LayerNorm, FP32LayerNorm
_RMS_NORMS = nn.RMSNorm, RMSNorm, MochiRMSNorm
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


def two_parts(x: Tensor, length: int) -> Tensor:
    """cu_rows, int32 [2B+1], of x [B, S, D] whose first `length` tokens have one row, and the others another."""
    batch, num_tokens, _ = x.shape
    cu_rows = torch.arange(0, batch * num_tokens + 1, num_tokens, dtype=torch.int32, device=x.device)
    return torch.cat([torch.stack([cu_rows[:-1], cu_rows[:-1] + length], dim=1).flatten(), cu_rows[-1:]])


def modulate(
    norm: nn.Module, x: Tensor, shift: Tensor | None = None, scale: Tensor | None = None, cu_rows: Tensor | None = None
) -> Tensor:
    """norm(x) * (1 + scale) + shift. With cu_rows the rows are [R, D], of x [B, S, D] as packed tokens."""
    shift, scale = _rows(x, shift, scale)
    y = layer_norm_modulate(x if cu_rows is None else x.flatten(0, 1), shift, scale, cu_rows, **_norm(norm))
    return y.view(x.shape)


def gate(residual: Tensor, x: Tensor, gate: Tensor | None = None, cu_rows: Tensor | None = None) -> Tensor:
    """residual + gate * x, in the residual's dtype."""
    shape, x = residual.shape, x.to(residual.dtype) if residual.dtype != torch.float32 else x
    if cu_rows is not None:
        residual, x = residual.flatten(0, 1), x.flatten(0, 1)
    (gate,) = _rows(x, gate)
    return gate_residual(residual, x, gate, cu_rows).view(shape)


def norm_gate(norm: nn.Module, residual: Tensor, x: Tensor, gate: Tensor | None = None, tanh: bool = False) -> Tensor:
    """residual + gate * norm(x), or with tanh(gate)."""
    (gate,) = _rows(x, gate)
    return norm_gate_residual(residual, x.to(residual.dtype), gate, tanh=tanh, **_norm(norm))


def gate_modulate(
    norm: nn.Module,
    residual: Tensor,
    x: Tensor,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    cu_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(residual, y): residual <- residual + gate * x; y = norm(residual) * (1 + scale) + shift."""
    shape, x = residual.shape, x.to(residual.dtype)
    if cu_rows is not None:
        residual, x = residual.flatten(0, 1), x.flatten(0, 1)
    gate, shift, scale = _rows(x, gate, shift, scale)
    if type(norm) is nn.Identity:
        residual = gate_residual(residual, x, gate, cu_rows).view(shape)
        return residual, residual
    residual, y = gate_residual_layer_norm_modulate(residual, x, gate, shift, scale, cu_rows, **_norm(norm))
    return residual.view(shape), y.view(shape)


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
    """Attention of [B, S, H, d] by the backend that the processor has been given -> [B, S, H * d]."""
    out = dispatch_attention_fn(query, key, value, attn_mask=mask, backend=processor._attention_backend, **options)
    return out.flatten(2, 3)


class Processor:
    """An attention processor as diffusers expects one; `set_attention_backend` replaces the backend."""

    _attention_backend: Any = AttentionBackendName("sora_varlen")
    _parallel_config: Any = None


def gelu(self: Any, hidden_states: Tensor) -> Tensor:
    """Of diffusers' GELU: its linear layer, and the tanh approximation."""
    hidden_states = self.proj(hidden_states)
    return bias_gelu(hidden_states) if self.approximate == "tanh" else self.gelu(hidden_states)


def tanh_gelu(self: Any, x: Tensor) -> Tensor:
    """Of torch's GELU."""
    return bias_gelu(x) if self.approximate == "tanh" else type(self).forward(self, x)


@unless_watched("norm")
def layer_norm_zero(
    self: Any, x: Tensor, timestep: Any = None, class_labels: Any = None, hidden_dtype: Any = None, emb: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Of AdaLayerNormZero."""
    if self.emb is not None:
        emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
    return layer_norm_zero_single(self, x, emb)


@unless_watched("norm")
def layer_norm_zero_single(self: Any, x: Tensor, emb: Tensor | None = None) -> tuple[Tensor, ...]:
    """Of AdaLayerNormZeroSingle."""
    shift, scale, *rows = self.linear(self.silu(emb)).split(x.shape[-1], dim=1)
    return modulate(self.norm, x, shift, scale), *rows


@unless_watched("norm")
def layer_norm_continuous(self: Any, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
    """Of AdaLayerNormContinuous."""
    scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
    return modulate(self.norm, x, shift, scale)
