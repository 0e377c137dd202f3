"""Mochi: two streams of different widths, RMS norms in front of layers and behind them, tanh gates, RoPE learned for each head.

diffusers loops over samples, to cut each prompt by its mask on the host. Its outputs then start at the first token, even where
padding is in front of the prompt. Here each token keeps its place.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import MochiAttnProcessor2_0
from diffusers.models.normalization import AdaLayerNormContinuous
from diffusers.models.transformers import transformer_mochi as mochi
from torch import Tensor, nn

from .parts import (
    Processor,
    Tables,
    ada_layer_norm_continuous,
    attend,
    fuses_norms,
    is_wrapped_norm,
    norm_gate,
    norm_modulate,
    qk_norm_rope,
)
from .patching import Family


class MochiProcessor(Processor):
    """Joint attention of video and text."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: Tables | None = None,
    ) -> tuple[Tensor, Tensor]:
        layers = (attn.to_q, attn.to_k, attn.to_v), (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        streams = (hidden_states, layers[0]), (encoder_hidden_states, layers[1])
        projected = [[layer(x).unflatten(2, (attn.heads, -1)) for layer in of_x] for x, of_x in streams]
        (query, key, value), (text_query, text_key, text_value) = projected
        query = qk_norm_rope(attn.norm_q, query, image_rotary_emb), qk_norm_rope(attn.norm_added_q, text_query, None)
        key = qk_norm_rope(attn.norm_k, key, image_rotary_emb), qk_norm_rope(attn.norm_added_k, text_key, None)
        length = hidden_states.shape[1]
        mask = F.pad(attention_mask.bool(), (length, 0), value=True)[:, None, None]
        query, key, value = (torch.cat(parts, dim=1) for parts in (query, key, (value, text_value)))
        out, text = attend(self, query, key, value, mask).tensor_split([length], dim=1)
        out = attn.to_out[1](attn.to_out[0](out))
        return out, attn.to_add_out(text) if hasattr(attn, "to_add_out") else text


def _rope(
    self: Any, pos_frequencies: Tensor, num_frames: int, height: int, width: int, device: Any = None, dtype: Any = None
) -> Tables:
    """Angles of frames, rows and columns, added for each token. Without linspace, which compiles for one grid only."""
    scale = (self.target_area / (height * width)) ** 0.5
    t, h, w = (torch.arange(n, dtype=torch.float32, device=device)[:, None, None] for n in (num_frames, height, width))
    h, w = (h - (height - 1) / 2) * scale, (w - (width - 1) / 2) * scale
    t, h, w = (x * frequencies for x, frequencies in zip((t, h, w), pos_frequencies.float(), strict=True))
    angles = (t[:, None, None] + h[:, None] + w).flatten(0, 2)
    return angles.cos(), angles.sin()


@fuses_norms("norm")
def _norm_zero(self: Any, hidden_states: Tensor, emb: Tensor) -> tuple[Tensor, ...]:
    scale, *rows = self.linear(self.silu(emb)).chunk(4, dim=1)
    return norm_modulate(self.norm, hidden_states, None, scale), *rows


def _norm_continuous(self: Any, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
    if not is_wrapped_norm(self.norm):
        return type(self).forward(self, x, conditioning_embedding)
    return norm_modulate(self.norm.norm, x, None, self.linear_1(self.silu(conditioning_embedding).to(x.dtype)))


def _layers(norms: tuple[Any, Any, Any], ff: nn.Module, x: Tensor, out: Tensor, rows: Any) -> Tensor:
    """Behind attention, of one stream."""
    norm_out, norm_in, norm_ff = (norm.norm for norm in norms)
    attn_gate, scale, ff_gate = rows
    x = norm_gate(norm_out, x, out, attn_gate, tanh=True)
    return norm_gate(norm_ff, x, ff(norm_modulate(norm_in, x, None, scale)), ff_gate, tanh=True)


def _block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    encoder_attention_mask: Tensor,
    image_rotary_emb: Tables | None = None,
) -> tuple[Tensor, Tensor]:
    x, text = hidden_states, encoder_hidden_states
    norms = self.norm2, self.norm3, self.norm4
    text_norms = self.norm2_context, self.norm3_context, self.norm4_context
    if not all(map(is_wrapped_norm, (*norms, *text_norms))):
        return type(self).forward(self, x, text, temb, encoder_attention_mask, image_rotary_emb)
    y, *rows = self.norm1(x, temb)
    text_y, *text_rows = (self.norm1_context(text, temb),) if self.context_pre_only else self.norm1_context(text, temb)
    out, text_out = self.attn1(
        hidden_states=y,
        encoder_hidden_states=text_y,
        image_rotary_emb=image_rotary_emb,
        attention_mask=encoder_attention_mask,
    )
    x = _layers(norms, self.ff, x, out, rows)
    return x, text if self.context_pre_only else _layers(text_norms, self.ff_context, text, text_out, text_rows)


FAMILY = Family(
    processors={MochiAttnProcessor2_0: MochiProcessor},
    forwards={
        AdaLayerNormContinuous: ada_layer_norm_continuous,
        mochi.MochiLayerNormContinuous: _norm_continuous,
        mochi.MochiRMSNormZero: _norm_zero,
        mochi.MochiRoPE: _rope,
        mochi.MochiTransformerBlock: _block,
    },
)
