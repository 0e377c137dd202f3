"""Qwen-Image: blocks of image and padded text, RMSNorm of heads, RoPE of complex numbers, images to edit behind the noisy one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.activations import GELU
from diffusers.models.normalization import AdaLayerNormContinuous
from diffusers.models.transformers import transformer_qwenimage
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from ...checks import fail
from .packed import (
    OP,
    Samples,
    boundaries,
    check_dtype,
    check_latents,
    check_not_hooked,
    check_width,
    one_time_each,
    refuse_image,
    run_block,
)
from .parts import (
    Packing,
    Processor,
    Tables,
    ada_layer_norm_continuous,
    attend,
    complex_tables,
    for_each_sample,
    fuses_norms,
    gate,
    gate_norm_modulate,
    gelu,
    joint_qkv,
    norm_modulate,
    within_float16,
)
from .patching import Family

Frequencies = tuple[Tensor, Tensor]
"""Complex numbers of the image's tokens and of the text's, [S, d/2]."""


@dataclass(frozen=True)
class QwenPacking(Packing):
    """Text and images are each packed by themselves, [T, D] and [N, D], and attend as one packed sequence of both, [T + N, D]."""

    text_tables: Tables
    cu_text: Tensor
    """int32 [B+1], of samples among the tokens of text."""
    order: Tensor
    """int64 [T+N]: which token of text and, behind them, images is at each place of the sequence."""
    inverse: Tensor
    """int64 [T+N]: at which place of the sequence each token is."""


class QwenProcessor(Processor):
    """Attention of text and image, of which some of the text may be padding."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Frequencies | QwenPacking | None = None,
    ) -> tuple[Tensor, Tensor]:
        if encoder_hidden_states is None:
            fail("QwenProcessor", "encoder_hidden_states", "a tensor, the text", "None")
        length = encoder_hidden_states.shape[1]
        if encoder_hidden_states_mask is not None:
            attention_mask = _joint_mask(encoder_hidden_states_mask, hidden_states)
        head_dim = attn.inner_dim // attn.heads
        image = [layer(hidden_states).unflatten(-1, (-1, head_dim)) for layer in (attn.to_q, attn.to_k, attn.to_v)]
        added = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
        text = [layer(encoder_hidden_states).unflatten(-1, (-1, head_dim)) for layer in added]
        if isinstance(image_rotary_emb, QwenPacking):
            text_out, out = self.packed(attn, text, image, image_rotary_emb)
        else:
            image_tables, text_tables = complex_tables(*image_rotary_emb) if image_rotary_emb else (None, None)
            query, key, value = joint_qkv(attn, text, image, text_tables, image_tables)
            out = attend(self, query, key, value, attention_mask, parallel_config=self._parallel_config).type_as(query)
            text_out, out = out[:, :length].contiguous(), out[:, length:].contiguous()
        for layer in attn.to_out:
            out = layer(out)
        return out, attn.to_add_out(text_out)

    def packed(self, attn: Any, text: list[Tensor], image: list[Tensor], packing: QwenPacking) -> tuple[Tensor, Tensor]:
        """Each sample's tokens of text and image attend together: (those of text, those of images)."""
        query, key, value = (x[packing.order] for x in joint_qkv(attn, text, image, packing.text_tables, packing.tables))
        out = attend(self, query, key, value, cu_seqlens=(packing.cu_seqlens, packing.cu_seqlens))[packing.inverse]
        return out[: len(text[0])], out[len(text[0]) :]


def _joint_mask(mask: Tensor, image: Tensor) -> Tensor:
    """That of the text, behind which comes the image, as one of keys, [B, 1, 1, S]."""
    return F.pad(mask.to(torch.bool), (0, image.shape[1]), value=True)[:, None, None]


def _model(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    encoder_hidden_states_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    img_shapes: Any = None,
    guidance: Tensor | None = None,
    attention_kwargs: dict[str, Any] | None = None,
    controlnet_block_samples: Any = None,
    additional_t_cond: Tensor | None = None,
    return_dict: bool = True,
) -> Any:
    """diffusers' own, but the mask is made once for all layers, and no constant of torch.compile depends on the text's length."""
    mask = encoder_hidden_states_mask
    if "attention_mask" in (attention_kwargs or {}):
        fail(type(self).__name__, "attention_kwargs", "no attention_mask (the text's is encoder_hidden_states_mask)", "one")
    if mask is not None:
        if encoder_hidden_states is None or mask.shape != encoder_hidden_states.shape[:2]:
            fail(type(self).__name__, "encoder_hidden_states_mask", "[B, S] of the text", str(list(mask.shape)))
        attention_kwargs = (attention_kwargs or {}) | {"attention_mask": _joint_mask(mask, hidden_states)}
    return type(self).forward(
        self,
        hidden_states,
        encoder_hidden_states,
        timestep=timestep,
        img_shapes=img_shapes,
        guidance=guidance,
        attention_kwargs=attention_kwargs,
        controlnet_block_samples=controlnet_block_samples,
        additional_t_cond=additional_t_cond,
        return_dict=return_dict,
    )


def _boundaries(modulate_index: Tensor) -> Tensor:
    """Of the tokens with index 0 and the others behind them, as the model has them in each sample."""
    batch, tokens = modulate_index.shape
    ends = torch.arange(1, batch + 1, device=modulate_index.device) * tokens
    behind = (modulate_index != 0).sum(dim=1)
    return F.pad(torch.stack([ends - behind, ends], dim=1).flatten(), (1, 0)).int()


@fuses_norms("img_norm1", "img_norm2", "txt_norm1", "txt_norm2")
def _block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_mask: Tensor | None,
    temb: Tensor,
    image_rotary_emb: Frequencies | QwenPacking | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    modulate_index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch = hidden_states.shape[0]
    encoder_hidden_states = for_each_sample(encoder_hidden_states, batch)
    rows = self.img_mod(temb)
    cu_rows, cu_text = (
        (image_rotary_emb.cu_rows, image_rotary_emb.cu_text) if isinstance(image_rotary_emb, QwenPacking) else (None, None)
    )
    if modulate_index is not None:
        # [2B, 6D], those of index 1 behind those of index 0 -> two of each sample
        pairs = [for_each_sample(part, batch) for part in rows.chunk(2)]
        rows, cu_rows = torch.stack(pairs, dim=1).flatten(0, 1), _boundaries(modulate_index)
    if self.zero_cond_t:
        temb = temb.chunk(2)[0]
    shift, scale, gate_, mlp_shift, mlp_scale, mlp_gate = rows.chunk(6, dim=-1)
    t_shift, t_scale, t_gate, t_mlp_shift, t_mlp_scale, t_mlp_gate = self.txt_mod(temb).chunk(6, dim=-1)
    out, text_out = self.attn(
        hidden_states=norm_modulate(self.img_norm1, hidden_states, shift, scale, cu_rows),
        encoder_hidden_states=norm_modulate(self.txt_norm1, encoder_hidden_states, t_shift, t_scale, cu_text),
        encoder_hidden_states_mask=encoder_hidden_states_mask,
        image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )
    x, y = gate_norm_modulate(self.img_norm2, hidden_states, out, gate_, mlp_shift, mlp_scale, cu_rows)
    x = gate(x, self.img_mlp(y), mlp_gate, cu_rows)
    text, y = gate_norm_modulate(self.txt_norm2, encoder_hidden_states, text_out, t_gate, t_mlp_shift, t_mlp_scale, cu_text)
    return within_float16(gate(text, self.txt_mlp(y), t_mlp_gate, cu_text)), within_float16(x)


def _packed(model: Any, samples: Samples) -> list[Tensor]:
    """The model's forward, of packed tokens."""
    refuse_image(samples)
    for option in ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"):
        if getattr(model.config, option, False):
            fail(OP, "model", f"one without {option}", "one with it")
    grids = check_latents(samples, model.config.in_channels // 4, (1, 2, 2))
    check_width("text", samples.text, model.config.joint_attention_dim)
    check_dtype("latents", samples.latents, model.img_in)
    check_dtype("text", samples.text, model.txt_in)
    check_not_hooked(model, "norm_out", "norm_out.norm")
    lengths, texts = [math.prod(grid) for grid in grids], [len(t) for t in samples.text]
    pattern = "c f (h ph) (w pw) -> (f h w) (c ph pw)"
    x = model.img_in(torch.cat([rearrange(x, pattern, ph=2, pw=2) for x in samples.latents]))
    text = model.txt_in(model.txt_norm(torch.cat(samples.text)))
    temb = model.time_text_embed(torch.cat(one_time_each(samples)).to(x.dtype), x)
    complex_numbers = [model.pos_embed([[grid]], max_txt_seq_len=n, device=x.device) for grid, n in zip(grids, texts, strict=True)]
    tables, text_tables = complex_tables(*(torch.cat(parts) for parts in zip(*complex_numbers, strict=True)))
    cu_rows, cu_text = boundaries(lengths, x), boundaries(texts, x)
    order = torch.cat([
        torch.cat(pair) for pair in zip(
            torch.arange(len(text), device=x.device).split(texts),
            torch.arange(len(text), len(text) + len(x), device=x.device).split(lengths),
            strict=True,
        )
    ])  # fmt: skip
    packing = QwenPacking(tables, cu_rows + cu_text, cu_rows, text_tables, cu_text, order, order.argsort())
    for block in model.transformer_blocks:
        text, x = run_block(model, block, x, text, None, temb, packing)
    scale, shift = model.norm_out.linear(model.norm_out.silu(temb).to(x.dtype)).chunk(2, dim=1)
    x = model.proj_out(norm_modulate(model.norm_out.norm, x, shift, scale, cu_rows))
    pattern = "(f h w) (c ph pw) -> c f (h ph) (w pw)"
    return [rearrange(part, pattern, f=f, h=h, w=w, ph=2, pw=2) for part, (f, h, w) in zip(x.split(lengths), grids, strict=True)]


FAMILY = Family(
    packed=_packed,
    processors={transformer_qwenimage.QwenDoubleStreamAttnProcessor2_0: QwenProcessor},
    forwards={
        AdaLayerNormContinuous: ada_layer_norm_continuous,
        GELU: gelu,
        transformer_qwenimage.QwenImageTransformer2DModel: _model,
        transformer_qwenimage.QwenImageTransformerBlock: _block,
    },
)
