"""Flux 1: double blocks of text and image, single blocks of both, RMSNorm of heads, interleaved RoPE of three axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.activations import GELU
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, AdaLayerNormZeroSingle
from diffusers.models.transformers import transformer_flux
from torch import Tensor, nn

from .parts import (
    Processor,
    Tables,
    ada_layer_norm_continuous,
    ada_layer_norm_zero,
    ada_layer_norm_zero_single,
    attend,
    for_each_sample,
    fuses_norms,
    gate,
    gate_norm_modulate,
    gelu,
    joint_qkv,
    pair_tables,
    qk_norm_rope,
    split_tables,
    torch_gelu,
    within_float16,
)
from .patching import Family


def flux_projections(module: Any, attn: Any, x: Tensor, text: Tensor | None, tables: Tables | None) -> Sequence[Tensor]:
    """Queries, keys and values of text and image, or of one sequence; `module` is that of Flux 1 or 2, which projects them."""
    tables = None if tables is None else pair_tables(*tables)
    projected = module._get_qkv_projections(attn, x, text)
    if text is None:
        query, key, value = (y.unflatten(-1, (-1, attn.head_dim)) for y in projected[:3])
        return qk_norm_rope(attn.norm_q, query, tables), qk_norm_rope(attn.norm_k, key, tables), value
    heads = [y.unflatten(-1, (-1, attn.head_dim)) for y in projected]
    return joint_qkv(attn, heads[3:], heads[:3], *split_tables(tables, text.shape[1]))


class FluxProcessor(Processor):
    """Attention of text and image, or of the one sequence that single blocks have."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Tables | None = None,
    ) -> Any:
        query, key, value = flux_projections(transformer_flux, attn, hidden_states, encoder_hidden_states, image_rotary_emb)
        out = attend(self, query, key, value, attention_mask, parallel_config=self._parallel_config).type_as(query)
        if encoder_hidden_states is None:
            return out
        length = encoder_hidden_states.shape[1]
        text, out = out[:, :length], out[:, length:]
        return attn.to_out[1](attn.to_out[0](out.contiguous())), attn.to_add_out(text.contiguous())


@fuses_norms("norm2", "norm2_context")
def _double_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Tables | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    encoder_hidden_states = for_each_sample(encoder_hidden_states, hidden_states.shape[0])
    y, *rows = self.norm1(hidden_states, emb=temb)
    text_y, *text_rows = self.norm1_context(encoder_hidden_states, emb=temb)
    out, text_out, *image_prompt = self.attn(
        hidden_states=y, encoder_hidden_states=text_y, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {})
    )
    x, y = gate_norm_modulate(self.norm2, hidden_states, out, *rows[:3])
    x = gate(x, self.ff(y), rows[3])
    for more in image_prompt:  # of an IP-Adapter's processor
        x = x + more
    text, y = gate_norm_modulate(self.norm2_context, encoder_hidden_states, text_out, *text_rows[:3])
    return within_float16(gate(text, self.ff_context(y), text_rows[3])), x


def _single_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Tables | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    length = encoder_hidden_states.shape[1]
    x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    y, gate_ = self.norm(x, emb=temb)
    out = self.attn(hidden_states=y, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
    out = self.proj_out(torch.cat([out, self.act_mlp(self.proj_mlp(y))], dim=2))
    x = within_float16(gate(x, out, gate_))
    return x[:, :length], x[:, length:]


FAMILY = Family(
    processors={transformer_flux.FluxAttnProcessor: FluxProcessor},
    forwards={
        AdaLayerNormContinuous: ada_layer_norm_continuous,
        AdaLayerNormZero: ada_layer_norm_zero,
        AdaLayerNormZeroSingle: ada_layer_norm_zero_single,
        GELU: gelu,
        nn.GELU: torch_gelu,
        transformer_flux.FluxSingleTransformerBlock: _single_block,
        transformer_flux.FluxTransformerBlock: _double_block,
    },
)
