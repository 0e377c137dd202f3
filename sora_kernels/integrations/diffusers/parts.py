"""What the families share: adaLN, norms, rotation and GELU, with the modules and tables that diffusers has."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.normalization import FP32LayerNorm, MochiRMSNorm, RMSNorm
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import has_torch_function

from ...adaln import gate_residual, gate_residual_layer_norm_modulate, layer_norm_modulate, norm_gate_residual
from ...attention import flash_attn_varlen_func
from ...bias_gelu import bias_gelu
from ...checks import fail
from ...last_result import LastResult
from ...norm_rope import apply_rope, norm_rope
from .attention_backend import BACKENDS

_LAYER_NORMS = nn.LayerNorm, FP32LayerNorm
_RMS_NORMS = nn.RMSNorm, RMSNorm, MochiRMSNorm
NATIVE = AttentionBackendName("native")
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


def is_wrapped_norm(module: nn.Module | None) -> bool:
    """Whether a kernel can take over the `norm` of this module, such as an adaLN with the linear layer of its modulation."""
    return module is None or (is_plain(module) and is_norm(module.norm))  # type: ignore[arg-type]


def fuses_norms(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a forward that fuses the norms of these names. Unless `is_norm` takes all of them, the class's own forward runs."""

    def decorate(forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def chosen(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if all(is_norm(getattr(self, name)) for name in names):
                return forward(self, *args, **kwargs)
            if any(isinstance(x, Packing) for x in (*args, *kwargs.values())):
                fail(
                    "packed_forward", type(self).__name__, f"{', '.join(names)} without hooks, offloading or casts", "one with them"
                )
            return type(self).forward(self, *args, **kwargs)

        return chosen

    return decorate


def _norm(module: Any, x: Tensor) -> dict[str, Any]:
    """A norm of x as adaLN's arguments. torch's RMSNorm has a default eps, that of the dtype in which it computes."""
    parameters = module.weight, getattr(module, "bias", None)
    weight, bias = (p if p is None or p.dtype in (x.dtype, torch.float32) else p.to(x.dtype) for p in parameters)
    if type(module) in _LAYER_NORMS:
        return {"norm": "layer", "weight": weight, "bias": bias, "eps": module.eps}
    computed_in = torch.float64 if x.dtype == torch.float64 else torch.float32
    eps = torch.finfo(computed_in).eps if module.eps is None else module.eps
    return {"norm": "rms", "weight": weight, "eps": eps}


def _rows(x: Tensor, *rows: Tensor | None, cu_rows: Tensor | None = None) -> list[Tensor | None]:
    """Rows as adaLN takes them: in x's dtype or float32, and one for each sample where the whole batch shares one."""
    rows = tuple(r if r is None or r.dtype in (x.dtype, torch.float32) else r.to(x.dtype) for r in rows)
    if cu_rows is None and x.ndim == 3 and x.shape[0] > 1:
        return [r if r is None else for_each_sample(r, x.shape[0]) for r in rows]
    return list(rows)


def for_each_sample(x: Tensor, batch: int) -> Tensor:
    """[B, ...] of x that all samples may share, [1, ...]."""
    return x.expand(batch, *x.shape[1:]) if x.shape[0] == 1 else x


def _tables(x: Tensor, tables: Tables | None) -> tuple[Tensor | None, Tensor | None]:
    if tables is None:
        return None, None
    cos, sin = (t if t.dtype in (x.dtype, torch.float32) else t.to(x.dtype) for t in tables)
    return cos, sin


def prefix_boundaries(x: Tensor, length: int) -> Tensor:
    """cu_rows, int32 [2B+1], of x [B, S, D] where each sample has two rows: of its first `length` tokens, and of the others."""
    batch, num_tokens, _ = x.shape
    cu_rows = torch.arange(0, batch * num_tokens + 1, num_tokens, dtype=torch.int32, device=x.device)
    return torch.cat([torch.stack([cu_rows[:-1], cu_rows[:-1] + length], dim=1).flatten(), cu_rows[-1:]])


def norm_modulate(
    norm: nn.Module, x: Tensor, shift: Tensor | None = None, scale: Tensor | None = None, cu_rows: Tensor | None = None
) -> Tensor:
    """norm(x) * (1 + scale) + shift.

    Here and below, x is [B, S, D] or packed [N, D]. Rows are [B, D], [B, 1, D] or [B, S, D], or with `cu_rows` [R, D]: row i is
    that of the tokens from cu_rows[i] to cu_rows[i + 1], counted through all samples.
    """
    shift, scale = _rows(x, shift, scale, cu_rows=cu_rows)
    return layer_norm_modulate(_tokens(x, cu_rows), shift, scale, cu_rows, **_norm(norm, x)).view_as(x)


def gate(residual: Tensor, x: Tensor, gate: Tensor | None = None, cu_rows: Tensor | None = None) -> Tensor:
    """residual + gate * x, in the residual's dtype."""
    x = x if residual.dtype == torch.float32 else x.to(residual.dtype)
    (gate,) = _rows(x, gate, cu_rows=cu_rows)
    return gate_residual(_tokens(residual, cu_rows), _tokens(x, cu_rows), gate, cu_rows).view_as(x)


def gate_norm_modulate(
    norm: nn.Module,
    residual: Tensor,
    x: Tensor,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    cu_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(residual, y): residual <- residual + gate * x; y = norm(residual) * (1 + scale) + shift."""
    x = x.to(residual.dtype)
    gate, shift, scale = _rows(x, gate, shift, scale, cu_rows=cu_rows)
    tokens = _tokens(residual, cu_rows), _tokens(x, cu_rows)
    if type(norm) is nn.Identity and shift is None and scale is None:
        residual = gate_residual(*tokens, gate, cu_rows).view_as(x)
        return residual, residual
    residual, y = gate_residual_layer_norm_modulate(*tokens, gate, shift, scale, cu_rows, **_norm(norm, x))
    return residual.view_as(x), y.view_as(x)


def norm_gate(
    norm: nn.Module, residual: Tensor, x: Tensor, gate: Tensor | None = None, cu_rows: Tensor | None = None, tanh: bool = False
) -> Tensor:
    """residual + g * norm(x), where g is the gate or its tanh, in the residual's dtype."""
    x = x.to(residual.dtype) if residual.dtype != torch.float32 else x
    (gate,) = _rows(x, gate, cu_rows=cu_rows)
    tokens = _tokens(residual, cu_rows), _tokens(x, cu_rows)
    return norm_gate_residual(*tokens, gate, cu_rows, tanh=tanh, **_norm(norm, x)).view_as(x)


def _tokens(x: Tensor, cu_rows: Tensor | None) -> Tensor:
    """[N, D] where there are boundaries."""
    return x if cu_rows is None else x.flatten(0, -2)


def qk_norm_rope(norm: nn.Module | None, x: Tensor, tables: Tables | None, across_heads: bool = False, **options: Any) -> Tensor:
    """Queries or keys x [B, S, H, d] or packed [N, H, d], normed for each head or across heads, if there is a norm, and rotated, if
    there are tables, [N, r/2] or [N, H, r/2]. `interleaved` is the one option of `apply_rope`.
    """
    if not is_norm(norm):
        x, norm = norm(x.flatten(-2)).view_as(x) if across_heads else norm(x), None  # type: ignore[misc]
    cos, sin = _tables(x, tables)
    if norm is None or type(norm) is nn.Identity:
        return x if cos is None or sin is None else apply_rope(x, cos, sin, **options)
    return norm_rope(x, cos, sin, across_heads=across_heads, **_norm(norm, x), **options)


@dataclass(frozen=True)
class Packing:
    """What a block has to know of a packed batch; it comes in the place of its tables. A family may add to it."""

    tables: Tables
    """[N, r/2] of the tokens."""
    cu_seqlens: Tensor
    """int32 [B+1], of samples among the tokens that attend."""
    cu_rows: Tensor
    """int32 [R+1], of rows of modulation among the tokens."""


def attend(
    processor: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    cu_seqlens: tuple[Tensor, Tensor] | None = None,
    **options: Any,
) -> Tensor:
    """Attention -> [B, S, H * d], or packed [N, H * d].

    Of [B, S, H, d] by the backend that the processor has been given; of packed queries and keys, with both boundaries, by ours.
    A mask may be one of keys, [B, Sk]. One that "sora_varlen" does not take, of queries or of numbers to add, is "sora"'s.
    """
    skipped = _scores_are_skipped(query)
    if cu_seqlens is not None:
        longest = len(query), len(key)  # no sample is longer
        return (value if skipped else flash_attn_varlen_func(query, key, value, *cu_seqlens, *longest)).flatten(-2)
    backend = NATIVE if skipped else processor._attention_backend
    if mask is not None and backend not in BACKENDS:
        mask = mask[:, None, None] if mask.ndim == 2 else mask
    elif mask is not None and not is_of_keys(mask):
        backend = AttentionBackendName("sora")
    return dispatch_attention_fn(query, key, value, attn_mask=mask, backend=backend, **options).flatten(-2)


def _scores_are_skipped(query: Tensor) -> bool:
    """Whether diffusers' perturbed-attention guidance is on: a function mode in which torch's attention returns its values."""
    if torch.compiler.is_compiling() or not has_torch_function((query,)):
        return False
    probe = query.new_zeros(1, 1, 1, 1)
    return F.scaled_dot_product_attention(probe, probe, probe) is probe


def is_of_keys(mask: Tensor) -> bool:
    """Whether a mask is bool, and the same for all heads and queries."""
    return mask.dtype == torch.bool and all(n == 1 for n in mask.shape[1:-1])


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
    """A mask [B, 1 or S, Sk], or [B*H, 1 or S, Sk], with an axis of heads. Others stay as they are."""
    if mask is None or mask.ndim != 3:
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


def torch_gelu(self: nn.GELU, x: Tensor) -> Tensor:
    """Of torch's GELU, in the tanh approximation."""
    return bias_gelu(x) if self.approximate == "tanh" else nn.GELU.forward(self, x)


@fuses_norms("norm")
def ada_layer_norm_zero(
    self: Any,
    x: Tensor,
    timestep: Tensor | None = None,
    class_labels: Tensor | None = None,
    hidden_dtype: torch.dtype | None = None,
    emb: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Of diffusers' AdaLayerNormZero: the modulated norm, and the four rows that its block needs later."""
    if self.emb is not None:
        emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
    shift, scale, *rest = self.linear(self.silu(emb)).chunk(6, dim=1)
    return norm_modulate(self.norm, x, shift, scale), *rest


@fuses_norms("norm")
def ada_layer_norm_zero_single(self: Any, x: Tensor, emb: Tensor) -> tuple[Tensor, Tensor]:
    """Of diffusers' AdaLayerNormZeroSingle: the modulated norm, and the gate."""
    shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
    return norm_modulate(self.norm, x, shift, scale), gate


@fuses_norms("norm")
def ada_layer_norm_continuous(self: Any, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
    """Of diffusers' AdaLayerNormContinuous, with which many models end."""
    scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
    return norm_modulate(self.norm, x, shift, scale)


def within_float16(x: Tensor) -> Tensor:
    """What overflowed in float16, within its range, as some blocks return it."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


@LastResult
def pair_tables(cos: Tensor, sin: Tensor, interleaved: bool = True) -> Tables:
    """Tables [..., r/2] of pairs, from [..., r], which have each number for both channels of its pair.

    Channels of a pair are neighbours if interleaved, else i and i + r/2.
    """
    if interleaved:
        return cos[..., 0::2].contiguous(), sin[..., 0::2].contiguous()
    half = cos.shape[-1] // 2
    return cos[..., :half].contiguous(), sin[..., :half].contiguous()


@LastResult
def complex_tables(*rotations: Tensor) -> list[Tables]:
    """Tables of complex numbers cos + i sin, for each tensor of them."""
    return [(z.real.contiguous(), z.imag.contiguous()) for z in rotations]


def joint_qkv(
    attn: Any, text: Sequence[Tensor], x: Sequence[Tensor], text_tables: Tables | None, tables: Tables | None
) -> list[Tensor]:
    """Query, key and value, [B, S, H, d] or [N, H, d], of text and, behind it, x, each given as its three projections."""
    query = qk_norm_rope(attn.norm_added_q, text[0], text_tables), qk_norm_rope(attn.norm_q, x[0], tables)
    key = qk_norm_rope(attn.norm_added_k, text[1], text_tables), qk_norm_rope(attn.norm_k, x[1], tables)
    return [torch.cat(pair, dim=-3) for pair in (query, key, (text[2], x[2]))]


def split_tables(tables: Tables | None, length: int) -> tuple[Tables | None, Tables | None]:
    """Tables [S, r/2] of a sequence -> those of its first `length` tokens, and those of the others."""
    if tables is None:
        return None, None
    cos, sin = tables
    return (cos[:length], sin[:length]), (cos[length:], sin[length:])
