"""Flux 2: modulation outside the blocks, queries, keys, values and feed-forward of one linear layer, RoPE of four axes."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.normalization import AdaLayerNormContinuous
from diffusers.models.transformers import transformer_flux2
from diffusers.models.transformers.transformer_flux2 import Flux2KVLayerCache, Flux2Modulation
from torch import Tensor

from .flux import flux_projections
from .parts import (
    Processor,
    Tables,
    ada_layer_norm_continuous,
    attend,
    for_each_sample,
    fuses_norms,
    gate,
    gate_norm_modulate,
    norm_modulate,
    pair_tables,
    qk_norm_rope,
    within_float16,
)
from .patching import Family

Cache = Flux2KVLayerCache | None


def _attend(
    processor: Processor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    length: int,
    kv_cache: Cache,
    kv_cache_mode: str | None,
    num_ref_tokens: int,
) -> Tensor:
    """Attention with a cache of reference images, which attend to themselves only and follow `length` tokens of text."""
    if kv_cache_mode == "extract" and num_ref_tokens > 0:
        if kv_cache is not None:
            kv_cache.store(*(x[:, length : length + num_ref_tokens].clone() for x in (key, value)))
            kv_cache = None
    elif kv_cache_mode != "cached" or kv_cache is None:
        return attend(processor, query, key, value, mask, parallel_config=processor._parallel_config)
    else:
        num_ref_tokens = 0
    out = transformer_flux2._flux2_kv_causal_attention(
        query, key, value, length, num_ref_tokens, kv_cache, processor._attention_backend
    )
    return out.flatten(2, 3)


class Flux2KVProcessor(Processor):
    """Attention of text and image, and of reference images whose keys and values may be cached."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Tables | None = None,
        kv_cache: Cache = None,
        kv_cache_mode: str | None = None,
        num_ref_tokens: int = 0,
    ) -> Any:
        length = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        query, key, value = flux_projections(transformer_flux2, attn, hidden_states, encoder_hidden_states, image_rotary_emb)
        out = _attend(self, query, key, value, attention_mask, length, kv_cache, kv_cache_mode, num_ref_tokens).type_as(query)
        text, out = out[:, :length], out[:, length:]
        out = attn.to_out[1](attn.to_out[0](out))
        return out if encoder_hidden_states is None else (out, attn.to_add_out(text))


class Flux2Processor(Flux2KVProcessor):
    """The same, without a cache."""

    def __call__(  # type: ignore[override]  # diffusers reads the names
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Tables | None = None,
    ) -> Any:
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)


class Flux2ParallelKVProcessor(Processor):
    """Attention of single blocks, and beside it their feed-forward layer."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Tables | None = None,
        kv_cache: Cache = None,
        kv_cache_mode: str | None = None,
        num_txt_tokens: int = 0,
        num_ref_tokens: int = 0,
    ) -> Tensor:
        projected = attn.to_qkv_mlp_proj(hidden_states)
        # By their ratio, which tensor parallelism keeps.
        qkv, mlp = 3 * attn.inner_dim, attn.mlp_hidden_dim * attn.mlp_mult_factor
        qkv = projected.shape[-1] * qkv // (qkv + mlp)
        heads, y = projected[..., :qkv], projected[..., qkv:]
        query, key, value = (x.unflatten(-1, (-1, attn.head_dim)) for x in heads.chunk(3, dim=-1))
        tables = None if image_rotary_emb is None else pair_tables(*image_rotary_emb)
        query, key = qk_norm_rope(attn.norm_q, query, tables), qk_norm_rope(attn.norm_k, key, tables)
        out = _attend(self, query, key, value, attention_mask, num_txt_tokens, kv_cache, kv_cache_mode, num_ref_tokens)
        out = out.type_as(query)
        return attn.to_out(torch.cat([out, attn.mlp_act_fn(y)], dim=-1))


class Flux2ParallelProcessor(Flux2ParallelKVProcessor):
    """The same, without a cache."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Tables | None = None,
    ) -> Tensor:
        return super().__call__(attn, hidden_states, attention_mask, image_rotary_emb)


@fuses_norms("norm1", "norm1_context", "norm2", "norm2_context")
def _double_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb_mod_img: Tensor,
    temb_mod_txt: Tensor,
    image_rotary_emb: Tables | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    encoder_hidden_states = for_each_sample(encoder_hidden_states, hidden_states.shape[0])
    # Rows [B, 1, D], or [B, S, D] with reference images, whose time is another one.
    (shift, scale, gate_), (mlp_shift, mlp_scale, mlp_gate) = Flux2Modulation.split(temb_mod_img, 2)
    (t_shift, t_scale, t_gate), (t_mlp_shift, t_mlp_scale, t_mlp_gate) = Flux2Modulation.split(temb_mod_txt, 2)
    out, text_out = self.attn(
        hidden_states=norm_modulate(self.norm1, hidden_states, shift, scale),
        encoder_hidden_states=norm_modulate(self.norm1_context, encoder_hidden_states, t_shift, t_scale),
        image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )
    x, y = gate_norm_modulate(self.norm2, hidden_states, out, gate_, mlp_shift, mlp_scale)
    x = gate(x, self.ff(y), mlp_gate)
    text, y = gate_norm_modulate(self.norm2_context, encoder_hidden_states, text_out, t_gate, t_mlp_shift, t_mlp_scale)
    return within_float16(gate(text, self.ff_context(y), t_mlp_gate)), x


@fuses_norms("norm")
def _single_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None,
    temb_mod: Tensor,
    image_rotary_emb: Tables | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    split_hidden_states: bool = False,
    text_seq_len: int | None = None,
) -> Any:
    x = hidden_states
    if encoder_hidden_states is not None:
        text_seq_len = encoder_hidden_states.shape[1]
        x = torch.cat([encoder_hidden_states, x], dim=1)
    ((shift, scale, gate_),) = Flux2Modulation.split(temb_mod, 1)
    y = norm_modulate(self.norm, x, shift, scale)
    out = self.attn(hidden_states=y, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
    x = within_float16(gate(x, out, gate_))
    return (x[:, :text_seq_len], x[:, text_seq_len:]) if split_hidden_states else x


FAMILY = Family(
    processors={
        transformer_flux2.Flux2AttnProcessor: Flux2Processor,
        transformer_flux2.Flux2KVAttnProcessor: Flux2KVProcessor,
        transformer_flux2.Flux2KVParallelSelfAttnProcessor: Flux2ParallelKVProcessor,
        transformer_flux2.Flux2ParallelSelfAttnProcessor: Flux2ParallelProcessor,
    },
    forwards={
        AdaLayerNormContinuous: ada_layer_norm_continuous,
        transformer_flux2.Flux2SingleTransformerBlock: _single_block,
        transformer_flux2.Flux2TransformerBlock: _double_block,
    },
)
