"""Kandinsky 5: adaLN in float32 of text and video, RMSNorm of each head in float32, RoPE of pairs, attention that may be sparse."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.transformers import transformer_kandinsky
from torch import Tensor, nn

from ...block_mask import BlockMask
from ...block_sparse_attention import block_sparse_attention
from ...layout import PackedLayout
from ...token_blocks import TokenBlocks
from .attention_backend import BACKENDS
from .parts import Processor, attend, for_each_sample, fuses_norms, gate, gate_norm_modulate, norm_modulate, qk_norm_rope
from .patching import Family


class Kandinsky5Processor(Processor):
    """Self-attention, and cross-attention to text."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        rotary_emb: Tensor | None = None,
        sparse_params: dict[str, Any] | None = None,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = attn.to_query(hidden_states), attn.to_key(context), attn.to_value(context)
        query, key, value = (x.unflatten(2, (attn.num_heads, -1)) for x in projected)
        query, key = _rotated(attn.query_norm, query, rotary_emb), _rotated(attn.key_norm, key, rotary_emb)
        if sparse_params is None:
            return attn.out_layer(attend(self, query, key, value, parallel_config=self._parallel_config))
        # Which blocks of 64 tokens attend to which: a mask that flex_attention knows.
        mask = transformer_kandinsky.nablaT_v2(query, key, sparse_params["sta_mask"], thr=sparse_params["P"])
        if self._attention_backend in BACKENDS and self._parallel_config is None:
            out = _sparse_attention(query, key, value, mask)
        else:
            backend = AttentionBackendName("flex") if self._attention_backend in BACKENDS else self._attention_backend
            out = dispatch_attention_fn(query, key, value, mask, backend=backend, parallel_config=self._parallel_config)
        return attn.out_layer(out.flatten(2))


def _sparse_attention(query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    """[B, S, H, d], each sample cut into runs of 64 tokens."""
    batch, num_tokens = query.shape[:2]
    blocks = TokenBlocks.runs(PackedLayout.from_grids([(1, 1, num_tokens)] * batch).to(query.device), 64)
    q, k, v = (x.flatten(0, 1) for x in (query, key, value))
    return block_sparse_attention(q, k, v, BlockMask.from_flex(mask, blocks)).unflatten(0, query.shape[:2])


def _rotated(norm: nn.Module, x: Tensor, rotary_emb: Tensor | None) -> Tensor:
    """rotary_emb [1, S, 2, d/2]: cosines and sines. As diffusers does, what is rotated is rounded to bfloat16 in any dtype."""
    if rotary_emb is None:
        return qk_norm_rope(norm, x, None)
    cos, sin = rotary_emb[0].unbind(1)
    return qk_norm_rope(norm, x, (cos, sin)).bfloat16().type_as(x)


def _tables(angles: Tensor) -> Tensor:
    return torch.stack([angles.cos(), angles.sin()], dim=-2)


def _text_rope(self: Any, pos: Tensor) -> Tensor:
    """[S, 2, d/2], instead of matrices 2 x 2."""
    return _tables(self.args[pos])


def _visual_rope(self: Any, shape: Any, pos: Any, scale_factor: Any = (1.0, 1.0, 1.0)) -> Tensor:
    """[1, T, H, W, 2, d/2], which is the same for all samples."""
    _, t, h, w = shape
    of_t, of_h, of_w = (getattr(self, f"args_{i}")[pos[i]] / scale_factor[i] for i in range(3))
    angles = of_t[:, None, None].expand(t, h, w, -1), of_h[:, None].expand(t, h, w, -1), of_w.expand(t, h, w, -1)
    return _tables(torch.cat(angles, dim=-1))[None]


@fuses_norms("self_attention_norm", "feed_forward_norm")
def _text_block(self: Any, x: Tensor, time_embed: Tensor, rope: Tensor) -> Tensor:
    shift, scale, gate_, f_shift, f_scale, f_gate = self.text_modulation(time_embed).chunk(6, dim=-1)
    x = for_each_sample(x, shift.shape[0])
    out = self.self_attention(norm_modulate(self.self_attention_norm, x, shift, scale), rotary_emb=rope)
    x, y = gate_norm_modulate(self.feed_forward_norm, x, out, gate_, f_shift, f_scale)
    return gate(x, self.feed_forward(y), f_gate)


@fuses_norms("self_attention_norm", "cross_attention_norm", "feed_forward_norm")
def _visual_block(
    self: Any, visual_embed: Tensor, text_embed: Tensor, time_embed: Tensor, rope: Tensor, sparse_params: dict[str, Any] | None
) -> Tensor:
    x = visual_embed
    rows = self.visual_modulation(time_embed).chunk(9, dim=-1)
    shift, scale, gate_, c_shift, c_scale, c_gate, f_shift, f_scale, f_gate = rows
    y = norm_modulate(self.self_attention_norm, x, shift, scale)
    out = self.self_attention(y, rotary_emb=rope, sparse_params=sparse_params)
    x, y = gate_norm_modulate(self.cross_attention_norm, x, out, gate_, c_shift, c_scale)
    out = self.cross_attention(y, encoder_hidden_states=text_embed)
    x, y = gate_norm_modulate(self.feed_forward_norm, x, out, c_gate, f_shift, f_scale)
    return gate(x, self.feed_forward(y), f_gate)


FAMILY = Family(
    processors={transformer_kandinsky.Kandinsky5AttnProcessor: Kandinsky5Processor},
    forwards={
        transformer_kandinsky.Kandinsky5RoPE1D: _text_rope,
        transformer_kandinsky.Kandinsky5RoPE3D: _visual_rope,
        transformer_kandinsky.Kandinsky5TransformerDecoderBlock: _visual_block,
        transformer_kandinsky.Kandinsky5TransformerEncoderBlock: _text_block,
    },
)
