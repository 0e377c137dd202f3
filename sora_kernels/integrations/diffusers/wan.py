"""Wan 2.1 and 2.2, VACE and Animate: float32 rows of modulation per sample or token, RMSNorm across heads, interleaved RoPE."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.models.activations import GELU
from diffusers.models.transformers import transformer_wan, transformer_wan_animate, transformer_wan_vace
from einops import rearrange
from torch import Tensor

from ...checks import fail
from .packed import OP, Samples, boundaries, check_dtype, check_latents, check_not_hooked, check_width, run_block
from .parts import (
    Packing,
    Processor,
    Tables,
    attend,
    fuses_norms,
    gate,
    gate_norm_modulate,
    gelu,
    norm_modulate,
    pair_tables,
    qk_norm_rope,
)
from .patching import Family


@dataclass(frozen=True)
class WanPacking(Packing):
    cu_text: Tensor
    """int32 [B+1], of samples among the tokens of text."""
    image: Tensor | None = None
    """[M, D], tokens of images, attended to beside the text."""
    cu_image: Tensor | None = None
    """int32 [B+1], of samples among them."""


class WanProcessor(Processor):
    """Self-attention, and cross-attention to text and image."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Tables | WanPacking | None = None,
    ) -> Tensor:
        if isinstance(rotary_emb, WanPacking):
            return self.packed(attn, hidden_states, encoder_hidden_states, rotary_emb)
        parallel, image = self._parallel_config, None
        if encoder_hidden_states is not None:
            parallel = None
            if attn.add_k_proj is not None:
                length = encoder_hidden_states.shape[1] - 512  # the text has 512 tokens, behind the image
                image, encoder_hidden_states = encoder_hidden_states[:, :length], encoder_hidden_states[:, length:]
        tables = None if rotary_emb is None else _tables(rotary_emb, attn.inner_dim // attn.heads)
        query, key, value = _projected(attn, hidden_states, encoder_hidden_states, tables)
        out = attend(self, query, key, value, attention_mask, parallel_config=parallel)
        if image is not None:
            out = out + attend(self, query, *_image_projected(attn, image))
        return attn.to_out[1](attn.to_out[0](out.type_as(query)))

    def packed(self, attn: Any, x: Tensor, text: Tensor | None, packing: WanPacking) -> Tensor:
        """x and text are [N, D]."""
        cu_q = packing.cu_seqlens
        tables, cu_k = (packing.tables, cu_q) if text is None else (None, packing.cu_text)
        query, key, value = _projected(attn, x, text, tables)
        out = attend(self, query, key, value, cu_seqlens=(cu_q, cu_k))
        if attn.add_k_proj is not None and packing.image is not None and packing.cu_image is not None:
            out = out + attend(self, query, *_image_projected(attn, packing.image), cu_seqlens=(cu_q, packing.cu_image))
        return attn.to_out[1](attn.to_out[0](out.type_as(query)))


def _projected(attn: Any, x: Tensor, text: Any, tables: Tables | None) -> tuple[Tensor, Tensor, Tensor]:
    """Query of x, key and value of the text, or of x too."""
    query, key, value = (y.unflatten(-1, (attn.heads, -1)) for y in transformer_wan._get_qkv_projections(attn, x, text))
    query = qk_norm_rope(attn.norm_q, query, tables, across_heads=True)
    return query, qk_norm_rope(attn.norm_k, key, tables, across_heads=True), value


def _image_projected(attn: Any, image: Tensor) -> tuple[Tensor, Tensor]:
    key, value = (y.unflatten(-1, (attn.heads, -1)) for y in transformer_wan._get_added_kv_projections(attn, image))
    return qk_norm_rope(attn.norm_added_k, key, None, across_heads=True), value


def _tables(rotary_emb: Tables, head_dim: int) -> Tables:
    """[N, d/2] or [1, N, 1, d/2] of `_rope`, or diffusers' own [1, N, 1, d], as [N, d/2]."""
    cos, sin = rotary_emb if rotary_emb[0].shape[-1] != head_dim else pair_tables(*rotary_emb)
    return cos.reshape(-1, cos.shape[-1]), sin.reshape(-1, sin.shape[-1])


def _rope(self: Any, hidden_states: Tensor) -> Tables:
    """diffusers' tables, [1, N, 1, d], as [1, N, 1, d/2]."""
    return pair_tables(*type(self).forward(self, hidden_states))


def _layers(self: Any, x: Tensor, text: Tensor, temb: Tensor, rotary_emb: Tables | WanPacking) -> Tensor:
    """Attention, cross-attention and feed-forward of both kinds of blocks, of a dense x or a packed one."""
    packing, cu_rows = (rotary_emb, rotary_emb.cu_rows) if isinstance(rotary_emb, WanPacking) else (None, None)
    # temb is [B, 6, D], or [B, S, 6, D] of Wan 2.2 TI2V, whose rows are of tokens. Of a packed batch it is [R, 6, D].
    rows = self.scale_shift_table.to(temb.device) + temb.float()
    shift, scale, gate_, c_shift, c_scale, c_gate = rows.unbind(-2)
    out = self.attn1(norm_modulate(self.norm1, x, shift, scale, cu_rows), None, None, rotary_emb)
    x, y = gate_norm_modulate(self.norm2, x, out, gate_, cu_rows=cu_rows)
    out = self.attn2(y, text, None, packing)
    x, y = gate_norm_modulate(self.norm3, x, out, None, c_shift, c_scale, cu_rows)
    return gate(x, self.ffn(y), c_gate, cu_rows)


@fuses_norms("norm1", "norm2", "norm3")
def _block(
    self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Tables | WanPacking
) -> Tensor:
    return _layers(self, hidden_states, encoder_hidden_states, temb, rotary_emb)


@fuses_norms("norm1", "norm2", "norm3")
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
        query, key = qk_norm_rope(attn.norm_q, query, None), qk_norm_rope(attn.norm_k, key, None)
        query = query.unflatten(1, (frames, -1)).flatten(0, 1)
        key, value = (x.unflatten(1, (frames, tokens)).flatten(0, 1) for x in (key, value))
        out = attend(self, query, key, value, parallel_config=self._parallel_config)
        out = attn.to_out(out.type_as(query).unflatten(0, (batch, frames)).flatten(1, 2))
        return out if attention_mask is None else out * attention_mask.flatten(start_dim=1)


def _packed(model: Any, samples: Samples) -> list[Tensor]:
    """The model's forward, of packed tokens."""
    patch_size = model.config.patch_size
    grids = check_latents(samples, model.config.in_channels, patch_size)
    check_width("text", samples.text, model.config.text_dim)
    check_dtype("latents", samples.latents, model.patch_embedding)
    check_dtype("text", samples.text, model.condition_embedder.text_embedder.linear_1)
    check_not_hooked(model, "norm_out")
    lengths = [math.prod(grid) for grid in grids]
    cu_rows = [length // len(t) for length, t in zip(lengths, samples.timesteps, strict=True) for _ in t]
    for i, (grid, t) in enumerate(zip(grids, samples.timesteps, strict=True)):
        if len(t) not in (1, grid[0]):
            fail(OP, f"timesteps[{i}]", f"one, or one for each of {grid[0]} token frames", str(len(t)))
    if (samples.image is None) != (model.condition_embedder.image_embedder is None):
        fail(
            OP,
            "image",
            "None" if samples.image is not None else "embeddings of images",
            "None" if samples.image is None else "some",
        )
    if model.config.pos_embed_seq_len is not None:
        fail(OP, "model", "one without pos_embed_seq_len (of a first and a last frame)", "one with it")
    cos, sin = (torch.cat(t).flatten(1) for t in zip(*(_tables(model.rope(x[None]), -1) for x in samples.latents), strict=True))
    x = torch.cat([model.patch_embedding(x[None])[0].flatten(1).T for x in samples.latents])
    temb, rows, text, _ = model.condition_embedder(torch.cat(samples.timesteps), torch.cat(samples.text)[None])
    packing = WanPacking(
        (cos, sin),
        cu_seqlens=boundaries(lengths, x),
        cu_text=boundaries([len(t) for t in samples.text], x),
        cu_rows=boundaries(cu_rows, x),
    )
    if samples.image is not None:
        check_width("image", samples.image, model.config.image_dim)
        for i, t in enumerate(samples.text):  # diffusers cuts image and text apart there
            if len(t) != 512:
                fail(OP, f"text[{i}]", "512 tokens beside an image, as the model itself takes them", str(len(t)))
        image = [model.condition_embedder.image_embedder(t[None])[0] for t in samples.image]
        packing = replace(packing, image=torch.cat(image), cu_image=boundaries([len(t) for t in image], x))
    rows = rows.unflatten(1, (6, -1))
    for block in model.blocks:
        x = run_block(model, block, x, text[0], rows, packing)
    shift, scale = (model.scale_shift_table + temb[:, None]).unbind(1)
    x = model.proj_out(norm_modulate(model.norm_out, x, shift, scale, packing.cu_rows))
    return [
        rearrange(
            part,
            "(t h w) (pt ph pw c) -> c (t pt) (h ph) (w pw)",
            t=t,
            h=h,
            w=w,
            pt=patch_size[0],
            ph=patch_size[1],
            pw=patch_size[2],
        )
        for part, (t, h, w) in zip(x.split(lengths), grids, strict=True)
    ]


FAMILY = Family(
    packed=_packed,
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
