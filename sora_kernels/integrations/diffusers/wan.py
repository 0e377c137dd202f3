"""Wan 2.1 and 2.2, VACE and Animate: float32 rows of modulation per sample or token, RMSNorm across heads, interleaved RoPE."""

from __future__ import annotations

from typing import Any

from diffusers.models.activations import GELU
from diffusers.models.transformers import transformer_wan, transformer_wan_animate, transformer_wan_vace
from torch import Tensor

from .parts import Processor, Tables, attend, gate, gate_modulate, gelu, modulate, normed_rotated, unless_watched
from .patching import Family


class WanProcessor(Processor):
    """Self-attention, and cross-attention to text and image."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Tables | None = None,
    ) -> Tensor:
        parallel = self._parallel_config if encoder_hidden_states is None else None
        image = None
        if attn.add_k_proj is not None:
            length = encoder_hidden_states.shape[1] - 512  # the text has 512 tokens, behind the image
            image, encoder_hidden_states = encoder_hidden_states[:, :length], encoder_hidden_states[:, length:]
        projected = transformer_wan._get_qkv_projections(attn, hidden_states, encoder_hidden_states)
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in projected)
        tables = None if rotary_emb is None else _tables(rotary_emb, query.shape[-1])
        query = normed_rotated(attn.norm_q, query, tables, across_heads=True)
        key = normed_rotated(attn.norm_k, key, tables, across_heads=True)
        out = attend(self, query, key, value, attention_mask, parallel_config=parallel)
        if image is not None:
            key, value = (x.unflatten(2, (attn.heads, -1)) for x in transformer_wan._get_added_kv_projections(attn, image))
            key = normed_rotated(attn.norm_added_k, key, None, across_heads=True)
            out = out + attend(self, query, key, value)
        return attn.to_out[1](attn.to_out[0](out.type_as(query)))


def _tables(rotary_emb: Tables, head_dim: int) -> Tables:
    """[1, N, 1, d/2] of `_rope`, or diffusers' own [1, N, 1, d], as [N, d/2]."""
    cos, sin = rotary_emb
    if cos.shape[-1] == head_dim:
        cos, sin = cos[..., 0::2], sin[..., 1::2]
    return cos.flatten(0, 2), sin.flatten(0, 2)


def _rope(self: Any, hidden_states: Tensor) -> Tables:
    """diffusers' tables have each number twice, once for each channel of a pair."""
    cos, sin = type(self).forward(self, hidden_states)
    return cos[..., 0::2].contiguous(), sin[..., 1::2].contiguous()


def _layers(self: Any, x: Tensor, text: Tensor, temb: Tensor, rotary_emb: Tables) -> Tensor:
    """Attention, cross-attention and feed-forward of both kinds of blocks."""
    # [B, 6, D], or [B, S, 6, D] of Wan 2.2 TI2V, whose rows are of tokens.
    rows = self.scale_shift_table.to(temb.device) + temb.float()
    shift, scale, gate_, c_shift, c_scale, c_gate = rows.unbind(-2)
    out = self.attn1(modulate(self.norm1, x, shift, scale), None, None, rotary_emb)
    x, y = gate_modulate(self.norm2, x, out, gate_)
    out = self.attn2(y, text, None, None)
    x, y = gate_modulate(self.norm3, x, out, None, c_shift, c_scale)
    return gate(x, self.ffn(y), c_gate)


@unless_watched("norm1", "norm2", "norm3")
def _block(self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Tables) -> Tensor:
    return _layers(self, hidden_states, encoder_hidden_states, temb, rotary_emb)


@unless_watched("norm1", "norm2", "norm3")
def _vace_block(
    self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, control_hidden_states: Tensor, temb: Tensor, rotary_emb: Tables
) -> tuple[Tensor | None, Tensor]:
    control = control_hidden_states
    if self.proj_in is not None:
        control = self.proj_in(control) + hidden_states
    control = _layers(self, control, encoder_hidden_states, temb, rotary_emb)
    return None if self.proj_out is None else self.proj_out(control), control


class WanAnimateFaceProcessor(Processor):
    """Each frame's tokens attend to what is known of the face in that frame."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        hidden_states, face = attn.pre_norm_q(hidden_states), attn.pre_norm_kv(encoder_hidden_states)
        batch, frames, tokens, _ = face.shape
        projected = transformer_wan_animate._get_qkv_projections(attn, hidden_states, face.flatten(1, 2))
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in projected)
        query, key = normed_rotated(attn.norm_q, query, None), normed_rotated(attn.norm_k, key, None)
        query = query.unflatten(1, (frames, -1)).flatten(0, 1)
        key, value = (x.unflatten(1, (frames, tokens)).flatten(0, 1) for x in (key, value))
        out = attend(self, query, key, value, parallel_config=self._parallel_config)
        out = attn.to_out(out.type_as(query).unflatten(0, (batch, frames)).flatten(1, 2))
        return out if attention_mask is None else out * attention_mask.flatten(start_dim=1)


FAMILY = Family(
    processors={
        transformer_wan.WanAttnProcessor: WanProcessor,
        transformer_wan_animate.WanAttnProcessor: WanProcessor,
        transformer_wan_animate.WanAnimateFaceBlockAttnProcessor: WanAnimateFaceProcessor,
    },
    forwards={
        GELU: gelu,
        transformer_wan.WanRotaryPosEmbed: _rope,
        transformer_wan.WanTransformerBlock: _block,
        transformer_wan_animate.WanRotaryPosEmbed: _rope,
        transformer_wan_animate.WanTransformerBlock: _block,
        transformer_wan_vace.WanVACETransformerBlock: _vace_block,
    },
)
