"""Z-Image: RMSNorm before and behind attention and feed-forward layers, tanh gates, RoPE of complex numbers, padded lists."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers import transformer_z_image
from torch import Tensor

from .parts import Processor, attend, modulate, norm_gate, normed_rotated, of_pairs, unless_watched
from .patching import Family


class ZImageProcessor(Processor):
    """Self-attention of image, text, or both, padded to the longest of the batch."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        projected = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in projected)
        # [B, S, d/2], as each sample's positions are its own
        tables = of_pairs(None if freqs_cis is None else freqs_cis.flatten(0, 1))
        query, key = normed_rotated(attn.norm_q, query, tables), normed_rotated(attn.norm_k, key, tables)
        out = attend(self, query, key, value, attention_mask, parallel_config=self._parallel_config).type_as(query)
        for layer in attn.to_out:
            out = layer(out)
        return out


def _rows(layer: Any, of_all: Tensor | None, noise_mask: Tensor | None, noisy: Tensor | None, clean: Tensor | None) -> Tensor:
    """What the linear layer makes of the time, [B, R], or of two times, of noisy and of clean tokens: [B, S, R]."""
    if noise_mask is None:
        return layer(of_all)
    return torch.where(noise_mask[..., None] == 1, layer(noisy)[:, None], layer(clean)[:, None])


@unless_watched("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")
def _block(
    self: Any,
    x: Tensor,
    attn_mask: Tensor | None,
    freqs_cis: Tensor,
    adaln_input: Tensor | None = None,
    noise_mask: Tensor | None = None,
    adaln_noisy: Tensor | None = None,
    adaln_clean: Tensor | None = None,
) -> Tensor:
    scale = gate = mlp_scale = mlp_gate = None
    if self.modulation:
        rows = _rows(self.adaLN_modulation, adaln_input, noise_mask, adaln_noisy, adaln_clean)
        scale, gate, mlp_scale, mlp_gate = rows.chunk(4, dim=-1)
    y = self.attention(modulate(self.attention_norm1, x, None, scale), attention_mask=attn_mask, freqs_cis=freqs_cis)
    x = norm_gate(self.attention_norm2, x, y, gate, tanh=True)
    y = self.feed_forward(modulate(self.ffn_norm1, x, None, mlp_scale))
    return norm_gate(self.ffn_norm2, x, y, mlp_gate, tanh=True)


@unless_watched("norm_final")
def _final_layer(
    self: Any,
    x: Tensor,
    c: Tensor | None = None,
    noise_mask: Tensor | None = None,
    c_noisy: Tensor | None = None,
    c_clean: Tensor | None = None,
) -> Tensor:
    scale = _rows(self.adaLN_modulation, c, noise_mask, c_noisy, c_clean)
    return self.linear(modulate(self.norm_final, x, None, scale))


def _prepare(model: Any) -> None:
    """The tables of RoPE, which belong to no module."""
    model.rope_embedder(torch.zeros(1, len(model.axes_dims), dtype=torch.int32, device=model.device))


FAMILY = Family(
    processors={transformer_z_image.ZSingleStreamAttnProcessor: ZImageProcessor},
    forwards={transformer_z_image.FinalLayer: _final_layer, transformer_z_image.ZImageTransformerBlock: _block},
    prepare=_prepare,
)
