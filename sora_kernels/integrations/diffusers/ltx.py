"""LTX-Video: RMSNorm, rows of modulation per sample or token, RoPE of the whole width before heads are split, a mask of text."""

from __future__ import annotations

from typing import Any

from diffusers.models.activations import GELU
from diffusers.models.transformers import transformer_ltx
from torch import Tensor

from .parts import (
    Processor,
    Tables,
    attend,
    fuses_norms,
    gate,
    gate_norm_modulate,
    gelu,
    mask_of_heads,
    norm_modulate,
    pair_tables,
    qk_norm_rope,
    text_keys,
)
from .patching import Family


class LTXProcessor(Processor):
    """Self-attention, and cross-attention to text."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Tables | None = None,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = attn.to_q(hidden_states).unflatten(2, (attn.heads, -1))
        key, value = (x.unflatten(2, (attn.heads, -1)) for x in (attn.to_k(context), attn.to_v(context)))
        tables = None if image_rotary_emb is None else _tables(image_rotary_emb, attn.heads)
        query = qk_norm_rope(attn.norm_q, query, tables, across_heads=True)
        key = qk_norm_rope(attn.norm_k, key, tables, across_heads=True)
        mask = mask_of_heads(attention_mask, query.shape[0], attn.heads)
        out = attend(self, query, key, value, mask, parallel_config=self._parallel_config)
        return attn.to_out[1](attn.to_out[0](out.type_as(query)))


def _tables(rotary_emb: Tables, heads: int) -> Tables:
    """[M, D/2] of `_rope` as [M, H, d/2]."""
    cos, sin = (table.unflatten(1, (heads, -1)) for table in rotary_emb)
    return cos, sin


def _rope(
    self: Any,
    hidden_states: Tensor,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    rope_interpolation_scale: Any = None,
    video_coords: Tensor | None = None,
) -> Tables:
    """[S, D/2], or [B*S, D/2] where samples have coordinates. diffusers' tables are [B, S, D]."""
    x = hidden_states if video_coords is not None else hidden_states[:1]
    cos, sin = type(self).forward(self, x, num_frames, height, width, rope_interpolation_scale, video_coords)
    return pair_tables(cos.flatten(0, 1), sin.flatten(0, 1))


@fuses_norms("norm1", "norm2")
def _block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Tables | None = None,
    encoder_attention_mask: Tensor | None = None,
) -> Tensor:
    x = hidden_states
    # [B, 1, 6, D], or [B, S, 6, D] where each token has its noise level.
    rows = self.scale_shift_table.to(temb.device) + temb.unflatten(2, (6, -1))
    shift, scale, gate_, f_shift, f_scale, f_gate = rows.unbind(2)
    x = gate(x, self.attn1(norm_modulate(self.norm1, x, shift, scale), image_rotary_emb=image_rotary_emb), gate_)
    out = self.attn2(x, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask)
    x, y = gate_norm_modulate(self.norm2, x, out, None, f_shift, f_scale)
    return gate(x, self.ff(y), f_gate)


_FORWARD = transformer_ltx.LTXVideoTransformer3DModel.forward
"""By name, as torch.compile does not trace type(self) of a class that diffusers has allowed in graphs."""


def _model(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    timestep: Tensor,
    encoder_attention_mask: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    mask = text_keys(encoder_attention_mask)
    return _FORWARD(self, hidden_states, encoder_hidden_states, timestep, mask, *args, **kwargs)


FAMILY = Family(
    processors={transformer_ltx.LTXVideoAttnProcessor: LTXProcessor},
    forwards={
        GELU: gelu,
        transformer_ltx.LTXVideoRotaryPosEmbed: _rope,
        transformer_ltx.LTXVideoTransformer3DModel: _model,
        transformer_ltx.LTXVideoTransformerBlock: _block,
    },
)
