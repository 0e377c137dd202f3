"""Z-Image: RMSNorm before and behind attention and feed-forward layers, tanh gates, RoPE of complex numbers, padded lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.transformers import transformer_z_image
from torch import Tensor

from .packed import (
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
from .parts import Packing, Processor, Tables, attend, complex_tables, fuses_norms, norm_gate, norm_modulate, qk_norm_rope
from .patching import Family


class ZImageProcessor(Processor):
    """Self-attention of image, text, or both, padded to the longest of the batch."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | Packing | None = None,
    ) -> Tensor:
        projected = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in projected)
        tables: Tables | None
        cu_seqlens = None
        if isinstance(freqs_cis, Packing):
            tables, cu_seqlens = freqs_cis.tables, (freqs_cis.cu_seqlens, freqs_cis.cu_seqlens)
        else:  # [B, S, d/2], as each sample's positions are its own
            tables = None if freqs_cis is None else _tables(freqs_cis)
        query, key = qk_norm_rope(attn.norm_q, query, tables), qk_norm_rope(attn.norm_k, key, tables)
        out = attend(self, query, key, value, attention_mask, cu_seqlens, parallel_config=self._parallel_config).type_as(query)
        for layer in attn.to_out:
            out = layer(out)
        return out


def _tables(freqs_cis: Tensor) -> Tables:
    """Complex numbers [..., S, d/2] -> [N, d/2]."""
    ((cos, sin),) = complex_tables(freqs_cis)
    return cos.flatten(0, -2), sin.flatten(0, -2)


def _rows(layer: Any, of_all: Tensor | None, noise_mask: Tensor | None, noisy: Tensor | None, clean: Tensor | None) -> Tensor:
    """What the linear layer makes of the time, [B, R], or of two times, of noisy and of clean tokens: [B, S, R]."""
    if noise_mask is None:
        return layer(of_all)
    return torch.where(noise_mask[..., None] == 1, layer(noisy)[:, None], layer(clean)[:, None])


@fuses_norms("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")
def _block(
    self: Any,
    x: Tensor,
    attn_mask: Tensor | None,
    freqs_cis: Tensor | Packing,
    adaln_input: Tensor | None = None,
    noise_mask: Tensor | None = None,
    adaln_noisy: Tensor | None = None,
    adaln_clean: Tensor | None = None,
) -> Tensor:
    scale = gate = mlp_scale = mlp_gate = None
    cu_rows = freqs_cis.cu_rows if isinstance(freqs_cis, Packing) else None
    if self.modulation:
        rows = _rows(self.adaLN_modulation, adaln_input, noise_mask, adaln_noisy, adaln_clean)
        scale, gate, mlp_scale, mlp_gate = rows.chunk(4, dim=-1)
    y = self.attention(norm_modulate(self.attention_norm1, x, None, scale, cu_rows), attention_mask=attn_mask, freqs_cis=freqs_cis)
    x = norm_gate(self.attention_norm2, x, y, gate, cu_rows, tanh=True)
    y = self.feed_forward(norm_modulate(self.ffn_norm1, x, None, mlp_scale, cu_rows))
    return norm_gate(self.ffn_norm2, x, y, mlp_gate, cu_rows, tanh=True)


@fuses_norms("norm_final")
def _final_layer(
    self: Any,
    x: Tensor,
    c: Tensor | None = None,
    noise_mask: Tensor | None = None,
    c_noisy: Tensor | None = None,
    c_clean: Tensor | None = None,
) -> Tensor:
    scale = _rows(self.adaLN_modulation, c, noise_mask, c_noisy, c_clean)
    return self.linear(norm_modulate(self.norm_final, x, None, scale))


def _prepare(model: Any) -> None:
    """The tables of RoPE, which belong to no module. A model without memory computes them when it has some."""
    if model.device.type != "meta":
        model.rope_embedder(torch.zeros(1, len(model.axes_dims), dtype=torch.int32, device=model.device))


def _packed(model: Any, samples: Samples) -> list[Tensor]:
    """The model's forward, of packed tokens. Image and text are each filled to 32 tokens with the model's own, which attend."""
    refuse_image(samples)
    check_latents(samples, model.config.in_channels, (1, 2, 2))
    check_width("text", samples.text, model.config.cap_feat_dim)
    check_dtype("latents", samples.latents, model.all_x_embedder["2-1"])
    check_dtype("text", samples.text, model.cap_embedder[1])
    check_not_hooked(model, "all_final_layer.2-1", "all_final_layer.2-1.norm_final")
    patches, captions, sizes, positions, text_positions, filled, text_filled = model.patchify_and_embed(
        samples.latents, samples.text, patch_size=2, f_patch_size=1
    )
    lengths, texts = [len(x) for x in patches], [len(t) for t in captions]
    x = _filled(model.all_x_embedder["2-1"](torch.cat(patches)), filled, model.x_pad_token)
    text = _filled(model.cap_embedder(torch.cat(captions)), text_filled, model.cap_pad_token)
    temb = model.t_embedder(torch.cat(one_time_each(samples)) * model.t_scale).type_as(x)
    frequencies, text_frequencies = (
        # There are more positions than tokens: diffusers leaves out those behind.
        model.rope_embedder(torch.cat([p[:n] for p, n in zip(*both, strict=True)]))
        for both in ((positions, lengths), (text_positions, texts))
    )
    packing, text_packing = _packing(frequencies, lengths), _packing(text_frequencies, texts)
    for block in model.noise_refiner:
        x = run_block(model, block, x, None, packing, temb)
    for block in model.context_refiner:
        text = run_block(model, block, text, None, text_packing)
    x = _interleaved(x.split(lengths), text.split(texts))
    frequencies = _interleaved(frequencies.split(lengths), text_frequencies.split(texts))
    both = [n + m for n, m in zip(lengths, texts, strict=True)]
    packing = _packing(frequencies, both)
    for block in model.layers:
        x = run_block(model, block, x, None, packing, temb)
    last = model.all_final_layer["2-1"]
    x = last.linear(norm_modulate(last.norm_final, x, None, last.adaLN_modulation(temb), packing.cu_rows))
    return model.unpatchify(list(x.split(both)), sizes, 2, 1)


def _filled(x: Tensor, where: list[Tensor], token: Tensor) -> Tensor:
    return torch.where(torch.cat(where)[:, None], token, x)


def _interleaved(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    return torch.cat([part for pair in zip(first, second, strict=True) for part in pair])


def _packing(frequencies: Tensor, lengths: list[int]) -> Packing:
    tables, cu_seqlens = _tables(frequencies), boundaries(lengths, frequencies)
    return Packing(tables, cu_seqlens, cu_rows=cu_seqlens)


FAMILY = Family(
    packed=_packed,
    processors={transformer_z_image.ZSingleStreamAttnProcessor: ZImageProcessor},
    forwards={transformer_z_image.FinalLayer: _final_layer, transformer_z_image.ZImageTransformerBlock: _block},
    prepare=_prepare,
)
