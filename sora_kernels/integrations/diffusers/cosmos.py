"""Cosmos 1 to 2.5 and its ControlNet: adaLN by small projections in each block, rows per sample or latent frame, RoPE of halves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffusers.models.controlnets import controlnet_cosmos
from diffusers.models.transformers import transformer_cosmos
from torch import Tensor

from .parts import (
    Processor,
    Tables,
    attend,
    gate,
    gate_norm_modulate,
    is_norm,
    is_wrapped_norm,
    norm_modulate,
    pair_tables,
    qk_norm_rope,
)
from .patching import Family


class CosmosProcessor(Processor):
    """Self-attention, and cross-attention to text."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Tables | None = None,
    ) -> Tensor:
        out = self.of_text(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        return attn.to_out[1](attn.to_out[0](out))

    def of_text(self, attn: Any, x: Tensor, text: Tensor | None, mask: Tensor | None, tables: Tables | None) -> Tensor:
        text = x if text is None else text
        query, key, value = (y.unflatten(2, (attn.heads, -1)) for y in (attn.to_q(x), attn.to_k(text), attn.to_v(text)))
        query = qk_norm_rope(attn.norm_q, query, tables, interleaved=False)
        key = qk_norm_rope(attn.norm_k, key, tables, interleaved=False)
        return attend(self, query, key, value, mask, parallel_config=self._parallel_config).type_as(query)


class CosmosImageProcessor(CosmosProcessor):
    """Cross-attention to text and to an image, which has projections of its own."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        image_rotary_emb: Tables | None = None,
    ) -> Tensor:
        text, image = encoder_hidden_states
        text_mask, image_mask = attention_mask or (None, None)
        out = self.of_text(attn, hidden_states, text, text_mask, image_rotary_emb)
        if image is not None:
            projected = attn.q_img(hidden_states), attn.k_img(image), attn.v_img(image)
            query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in projected)
            query, key = qk_norm_rope(attn.q_img_norm, query, None), qk_norm_rope(attn.k_img_norm, key, None)
            out = out + attend(self, query, key, value, image_mask).type_as(query)
        return attn.to_out[1](attn.to_out[0](out))


def _rope(self: Any, hidden_states: Tensor, fps: int | None = None) -> Tables:
    """diffusers' tables, [S, d], as [S, d/2]."""
    return pair_tables(*type(self).forward(self, hidden_states, fps), False)


def _rows(norm: Any, count: int, x: Tensor, embedded_timestep: Tensor, temb: Tensor | None) -> tuple[Tensor, ...]:
    """Shift, scale and, of three, gate [B, F, D]: F is 1, or the number of latent frames if each has its noise level."""
    rows = norm.linear_2(norm.linear_1(norm.activation(embedded_timestep)))
    if temb is not None:
        rows = rows + temb[..., : rows.shape[-1]]
    if rows.ndim == 2:
        rows = (rows.expand(x.shape[0], -1) if rows.shape[0] == 1 else rows).unflatten(0, (x.shape[0], -1))
    return rows.chunk(count, dim=-1)


def _per_token(x: Tensor, *embeddings: Tensor | None) -> Iterator[Tensor | None]:
    """Embeddings of frames [B*F, D] repeated for each token, as diffusers' own forwards want them."""
    for e in embeddings:
        if e is not None and e.ndim == 2 and e.shape[0] not in (1, x.shape[0]):
            e = e.unflatten(0, (x.shape[0], -1))
            e = e.repeat_interleave(x.shape[1] // e.shape[1], dim=1)
        yield e


def _block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Any,
    embedded_timestep: Tensor,
    temb: Tensor | None = None,
    image_rotary_emb: Tables | None = None,
    extra_pos_emb: Tensor | None = None,
    attention_mask: Tensor | None = None,
    controlnet_residual: Tensor | None = None,
    latents: Tensor | None = None,
    block_idx: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    x = hidden_states
    if not all(map(is_wrapped_norm, (self.norm1, self.norm2, self.norm3))):
        embedded_timestep, temb = _per_token(x, embedded_timestep, temb)  # type: ignore[assignment]
        times = embedded_timestep, temb, image_rotary_emb, extra_pos_emb
        rest = attention_mask, controlnet_residual, latents, block_idx
        return type(self).forward(self, x, encoder_hidden_states, *times, *rest)
    if self.before_proj is not None:
        x = self.before_proj(x) + latents
    shift, scale, gate_ = _rows(self.norm1, 3, x, embedded_timestep, temb)
    if extra_pos_emb is None:
        y = norm_modulate(self.norm1.norm, x, shift, scale)
    else:
        x, y = gate_norm_modulate(self.norm1.norm, x, extra_pos_emb, None, shift, scale)
    out = self.attn1(y, image_rotary_emb=image_rotary_emb)
    shift, scale, next_gate = _rows(self.norm2, 3, x, embedded_timestep, temb)
    x, y = gate_norm_modulate(self.norm2.norm, x, out, gate_, shift, scale)
    out = self.attn2(y, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask)
    shift, scale, gate_ = _rows(self.norm3, 3, x, embedded_timestep, temb)
    x, y = gate_norm_modulate(self.norm3.norm, x, out, next_gate, shift, scale)
    x = gate(x, self.ff(y), gate_)
    if controlnet_residual is not None:
        x = x + controlnet_residual
    return x if self.after_proj is None else (x, self.after_proj(x))


def _norm_out(self: Any, hidden_states: Tensor, embedded_timestep: Tensor, temb: Tensor | None = None) -> Tensor:
    if not is_norm(self.norm):
        return type(self).forward(self, hidden_states, *_per_token(hidden_states, embedded_timestep, temb))
    return norm_modulate(self.norm, hidden_states, *_rows(self, 2, hidden_states, embedded_timestep, temb))


def _timestep(model: Any, timestep: Tensor, latents: Tensor) -> Tensor:
    """[B, 1, T, 1, 1] -> [B*T], which keeps diffusers from repeating what follows from it for each token."""
    batch, _, frames, *_ = latents.shape
    per_frame = timestep.shape == (batch, 1, frames, 1, 1) and model.config.patch_size[0] == 1
    return timestep.flatten() if per_frame else timestep


def _model(self: Any, hidden_states: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Any:
    return type(self).forward(self, hidden_states, _timestep(self, timestep, hidden_states), *args, **kwargs)


def _controlnet(self: Any, controls_latents: Tensor, latents: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Any:
    return type(self).forward(self, controls_latents, latents, _timestep(self, timestep, latents), *args, **kwargs)


FAMILY = Family(
    processors={
        transformer_cosmos.CosmosAttnProcessor2_0: CosmosProcessor,
        transformer_cosmos.CosmosAttnProcessor2_5: CosmosImageProcessor,
    },
    forwards={
        controlnet_cosmos.CosmosControlNetModel: _controlnet,
        transformer_cosmos.CosmosAdaLayerNorm: _norm_out,
        transformer_cosmos.CosmosRotaryPosEmbed: _rope,
        transformer_cosmos.CosmosTransformer3DModel: _model,
        transformer_cosmos.CosmosTransformerBlock: _block,
    },
)
