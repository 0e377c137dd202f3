"""CogVideoX: text in front of video in one sequence, each with rows of its own, LayerNorm per head, RoPE of the video if any."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0, FusedCogVideoXAttnProcessor2_0
from diffusers.models.normalization import AdaLayerNorm
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch import Tensor

from .parts import (
    Processor,
    Tables,
    attend,
    fuses_norms,
    gate,
    gate_norm_modulate,
    gelu,
    is_wrapped_norm,
    mask_of_heads,
    norm_modulate,
    pair_tables,
    prefix_boundaries,
    qk_norm_rope,
)
from .patching import Family


class CogVideoXProcessor(Processor):
    """Self-attention of text and video. Without encoder_hidden_states, hidden_states are both."""

    fused = False

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Tables | None = None,
    ) -> Any:
        x, text = hidden_states, encoder_hidden_states
        if text is not None:
            x = torch.cat([text, x], dim=1)
        projected = attn.to_qkv(x).chunk(3, dim=-1) if self.fused else (attn.to_q(x), attn.to_k(x), attn.to_v(x))
        query, key, value = (p.unflatten(2, (attn.heads, -1)) for p in projected)
        tables = None if image_rotary_emb is None else _tables(image_rotary_emb, x)
        query, key = qk_norm_rope(attn.norm_q, query, tables), qk_norm_rope(attn.norm_k, key, tables)
        mask = mask_of_heads(attention_mask, x.shape[0], attn.heads)
        out = attn.to_out[1](attn.to_out[0](attend(self, query, key, value, mask)))
        return out if text is None else (out[:, text.shape[1] :], out[:, : text.shape[1]])


class FusedCogVideoXProcessor(CogVideoXProcessor):
    """The same with one projection, behind `fuse_qkv_projections`."""

    fused = True


def _tables(rotary_emb: Tables, x: Tensor) -> Tables:
    """[S, d/2] of text, which is not rotated, and video. diffusers' tables are [N, d] of the video."""
    cos, sin = (table.to(x.device) for table in pair_tables(*rotary_emb))
    text = x.shape[1] - cos.shape[0]
    return F.pad(cos, (0, 0, text, 0), value=1.0), F.pad(sin, (0, 0, text, 0))


def _rows(norm: Any, temb: Tensor) -> tuple[Tensor, ...]:
    """Shift, scale and gate, [2B, D], of each sample's text and video; the layer has those of the video first."""
    return norm.linear(norm.silu(temb)).unflatten(1, (2, 3, -1)).flip(1).flatten(0, 1).unbind(1)


def _block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Tables | None = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    norms = self.norm1, self.norm2
    if not (isinstance(self.attn1.processor, Processor) and all(map(is_wrapped_norm, norms))):
        return type(self).forward(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb, attention_kwargs)
    length = encoder_hidden_states.shape[1]
    x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    cu_rows = prefix_boundaries(x, length)
    temb = temb.expand(x.shape[0], -1)
    (shift, scale, attn_gate), (ff_shift, ff_scale, ff_gate) = (_rows(norm, temb) for norm in norms)
    y = norm_modulate(self.norm1.norm, x, shift, scale, cu_rows)
    out = self.attn1(hidden_states=y, image_rotary_emb=image_rotary_emb, **(attention_kwargs or {}))
    x, y = gate_norm_modulate(self.norm2.norm, x, out, attn_gate, ff_shift, ff_scale, cu_rows)
    x = gate(x, self.ff(y), ff_gate, cu_rows)
    return x[:, length:], x[:, :length]


@fuses_norms("norm")
def _norm_out(self: Any, x: Tensor, timestep: Tensor | None = None, temb: Tensor | None = None) -> Tensor:
    if self.chunk_dim != 1 or self.emb is not None:
        return type(self).forward(self, x, timestep, temb)
    shift, scale = self.linear(self.silu(temb)).chunk(2, dim=1)
    return norm_modulate(self.norm, x, shift, scale)


FAMILY = Family(
    processors={
        CogVideoXAttnProcessor2_0: CogVideoXProcessor,
        FusedCogVideoXAttnProcessor2_0: FusedCogVideoXProcessor,
    },
    forwards={AdaLayerNorm: _norm_out, CogVideoXBlock: _block, GELU: gelu},
)
