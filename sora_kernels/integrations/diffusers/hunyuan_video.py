"""HunyuanVideo and FramePack: blocks of two streams and of one, RMSNorm per head, interleaved RoPE of video, a mask of text.

diffusers attends to as many tokens of a prompt as its mask has, from the first on. So its tokenizer's padding is behind the prompt.
Here the refiner moves the prompt in front of its padding, wherever that was: text has no positions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, AdaLayerNormZeroSingle
from diffusers.models.transformers import transformer_hunyuan_video as hunyuan
from diffusers.models.transformers import transformer_hunyuan_video_framepack as framepack
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from .packed import run_block
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
    is_wrapped_norm,
    norm_modulate,
    pair_tables,
    prefix_boundaries,
    qk_norm_rope,
    torch_gelu,
)
from .patching import Family


class HunyuanVideoProcessor(Processor):
    """Joint attention of video and text. Of a block with one stream, hidden_states may be both already."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Tables | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        x, text = hidden_states, encoder_hidden_states
        if text is not None and attn.add_q_proj is None:
            x = torch.cat([x, text], dim=1)
        query, key, value = (project(x).unflatten(2, (attn.heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v))
        tables = None if image_rotary_emb is None else _tables(image_rotary_emb, *query.shape[1::2])
        query, key = qk_norm_rope(attn.norm_q, query, tables), qk_norm_rope(attn.norm_k, key, tables)
        if text is not None and attn.add_q_proj is not None:
            projections = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
            text_query, text_key, text_value = (project(text).unflatten(2, (attn.heads, -1)) for project in projections)
            query = torch.cat([query, qk_norm_rope(attn.norm_added_q, text_query, None)], dim=1)
            key = torch.cat([key, qk_norm_rope(attn.norm_added_k, text_key, None)], dim=1)
            value = torch.cat([value, text_value], dim=1)
        out = attend(self, query, key, value, attention_mask, parallel_config=self._parallel_config).to(query.dtype)
        if text is None:
            return out, None
        out, text = out.tensor_split([out.shape[1] - text.shape[1]], dim=1)
        if attn.to_out is not None:
            out = attn.to_out[1](attn.to_out[0](out))
        return out, text if attn.to_add_out is None else attn.to_add_out(text)


def _tables(rotary_emb: Tables, num_tokens: int, head_dim: int) -> Tables:
    """[N, d/2] of `rope`, or diffusers' own [N, d]; text behind the video is not rotated."""
    cos, sin = rotary_emb if rotary_emb[0].shape[-1] != head_dim else pair_tables(*rotary_emb)
    text = num_tokens - cos.shape[0]
    return F.pad(cos, (0, 0, 0, text), value=1.0), F.pad(sin, (0, 0, 0, text))


def rope(self: Any, hidden_states: Tensor) -> Tables:
    """diffusers' tables, [N, d], as [N, d/2]."""
    return pair_tables(*type(self).forward(self, hidden_states))


def _double(
    self: Any,
    streams: tuple[Tensor, Tensor],
    normed: Tensor,
    rows: Any,
    temb: Tensor,
    mask: Tensor | None,
    tables: Tables | None,
    cu_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Behind the first norm of the video, whose other rows are given."""
    (x, text), (gate_, shift, scale, ff_gate) = streams, rows
    y, text_gate, text_shift, text_scale, text_ff_gate = self.norm1_context(text, emb=temb)
    out, text_out = self.attn(hidden_states=normed, encoder_hidden_states=y, attention_mask=mask, image_rotary_emb=tables)
    x, y = gate_norm_modulate(self.norm2, x, out, gate_, shift, scale, cu_rows)
    x = gate(x, self.ff(y), ff_gate, cu_rows)
    text, y = gate_norm_modulate(self.norm2_context, text, text_out, text_gate, text_shift, text_scale)
    return x, gate(text, self.ff_context(y), text_ff_gate)


@fuses_norms("norm2", "norm2_context")
def double_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    freqs_cis: Tables | None = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    normed, *rows = self.norm1(hidden_states, emb=temb)
    return _double(self, (hidden_states, encoder_hidden_states), normed, rows, temb, attention_mask, freqs_cis)


def _single_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Tables | None = None,
    token_replace_emb: Any = None,
    num_tokens: Any = None,
) -> tuple[Tensor, Tensor]:
    """Of both kinds: with token_replace_emb, the first num_tokens have rows of their own."""
    replaced = type(self) is hunyuan.HunyuanVideoTokenReplaceSingleTransformerBlock
    if not isinstance(self.attn.processor, Processor) or (replaced and not is_wrapped_norm(self.norm)):
        rest = (token_replace_emb, num_tokens) if replaced else ()
        return type(self).forward(self, hidden_states, encoder_hidden_states, temb, attention_mask, image_rotary_emb, *rest)
    length = hidden_states.shape[1]
    x, cu_rows = torch.cat([hidden_states, encoder_hidden_states], dim=1), None
    if replaced:
        cu_rows = prefix_boundaries(x, num_tokens)
        shift, scale, gate_ = _replaced_rows(self.norm, len(x), temb, token_replace_emb, 3)
        y = norm_modulate(self.norm.norm, x, shift, scale, cu_rows)
    else:
        y, gate_ = self.norm(x, emb=temb)
    mlp = self.act_mlp(self.proj_mlp(y))
    # In two parts, as hooks on the attention expect them.
    streams = {"hidden_states": y[:, :length], "encoder_hidden_states": y[:, length:]}
    out = torch.cat(self.attn(**streams, attention_mask=attention_mask, image_rotary_emb=image_rotary_emb), dim=1)
    x = gate(x, self.proj_out(torch.cat([out, mlp], dim=2)), gate_, cu_rows)
    return x[:, :length], x[:, length:]


def _replaced_rows(norm: Any, batch: int, temb: Tensor, first: Tensor, count: int) -> tuple[Tensor, ...]:
    """[2B, D]: of each sample those of the first frame, which has no noise, and those of the others."""
    rows = [for_each_sample(norm.linear(norm.silu(emb)), batch) for emb in (first, temb)]
    return torch.stack(rows, dim=1).flatten(0, 1).chunk(count, dim=1)


@fuses_norms("norm2", "norm2_context")
def _replaced_double_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    freqs_cis: Tables | None = None,
    token_replace_emb: Any = None,
    num_tokens: Any = None,
) -> tuple[Tensor, Tensor]:
    streams = hidden_states, encoder_hidden_states
    if not is_wrapped_norm(self.norm1):
        return type(self).forward(self, *streams, temb, attention_mask, freqs_cis, token_replace_emb, num_tokens)
    cu_rows = prefix_boundaries(hidden_states, num_tokens)
    shift, scale, gate_, *rest = _replaced_rows(self.norm1, len(hidden_states), temb, token_replace_emb, 6)
    normed = norm_modulate(self.norm1.norm, hidden_states, shift, scale, cu_rows)
    return _double(self, streams, normed, (gate_, *rest), temb, attention_mask, freqs_cis, cu_rows)


class RefinerProcessor(Processor):
    """Self-attention of text."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        projections = attn.to_q, attn.to_k, attn.to_v
        query, key, value = (project(hidden_states).unflatten(2, (attn.heads, -1)) for project in projections)
        return attn.to_out[1](attn.to_out[0](attend(self, query, key, value, attention_mask)))


@fuses_norms("norm1", "norm2")
def refiner_block(self: Any, hidden_states: Tensor, temb: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    x = hidden_states
    out = self.attn(hidden_states=norm_modulate(self.norm1, x), encoder_hidden_states=None, attention_mask=attention_mask)
    attn_gate, ff_gate = self.norm_out(temb)
    x, y = gate_norm_modulate(self.norm2, x, out, attn_gate)
    return gate(x, self.ff(y), ff_gate)


def refiner_blocks(self: Any, hidden_states: Tensor, temb: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """With a mask of keys. Outputs at padded places are not used, so no mask of queries is needed."""
    if attention_mask is not None:
        attention_mask = attention_mask.to(hidden_states.device).bool()[:, None, None]
    for block in self.refiner_blocks:
        hidden_states = block(hidden_states, temb, attention_mask)
    return hidden_states


def _refiner(self: Any, hidden_states: Tensor, timestep: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """The prompt in front of its padding."""
    if attention_mask is not None:
        order = attention_mask.bool().logical_not().to(torch.uint8).argsort(dim=1, stable=True)
        attention_mask = attention_mask.gather(1, order)
        hidden_states = for_each_sample(hidden_states, len(order))
        hidden_states = hidden_states.gather(1, order[..., None].expand_as(hidden_states))
    return type(self).forward(self, hidden_states, timestep, attention_mask)


def run_blocks(model: Any, blocks: nn.ModuleList, streams: tuple[Tensor, Tensor], *args: Any) -> tuple[Tensor, Tensor]:
    for block in blocks:
        streams = run_block(model, block, *streams, *args)
    return streams


def video(model: Any, x: Tensor, temb: Tensor, shape: torch.Size, return_dict: bool) -> Any:
    """The model's last layers: tokens [B, N, D] -> [B, C, T, H, W], whose T, H and W are those of `shape`."""
    x = model.proj_out(model.norm_out(x, temb))
    t, p = model.config.patch_size_t, model.config.patch_size
    frames, height, width = shape[2] // t, shape[3] // p, shape[4] // p
    x = x.reshape(shape[0], frames, height, width, -1, t, p, p).permute(0, 4, 1, 5, 2, 6, 3, 7)
    x = x.reshape(shape[0], -1, frames * t, height * p, width * p)
    return Transformer2DModelOutput(sample=x) if return_dict else (x,)


@apply_lora_scale("attention_kwargs")
def _framepack(
    self: Any,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_attention_mask: Tensor,
    pooled_projections: Tensor,
    image_embeds: Tensor,
    indices_latents: Tensor,
    guidance: Tensor | None = None,
    latents_clean: Tensor | None = None,
    indices_latents_clean: Tensor | None = None,
    latents_history_2x: Tensor | None = None,
    indices_latents_history_2x: Tensor | None = None,
    latents_history_4x: Tensor | None = None,
    indices_latents_history_4x: Tensor | None = None,
    attention_kwargs: dict[str, Any] | None = None,
    return_dict: bool = True,
) -> Any:
    """Of FramePack's model, which cuts text by its mask on the host: here the mask stays one of keys."""
    size = {"height": hidden_states.shape[3], "width": hidden_states.shape[4], "device": hidden_states.device}
    indices = indices_latents, indices_latents_clean, indices_latents_history_2x, indices_latents_history_4x
    tables = [None if i is None else self.rope(frame_indices=i, **size) for i in indices]
    history = self.clean_x_embedder(latents_clean, latents_history_2x, latents_history_4x)
    grid = (size["height"] // self.config.patch_size, size["width"] // self.config.patch_size)
    x = self.x_embedder(hidden_states)
    num_tokens = x.shape[1]
    x, table = self._pack_history_states(x, *history, *tables, *grid)
    temb, _ = self.time_text_embed(timestep, pooled_projections, guidance)
    text = self.context_embedder(encoder_hidden_states, timestep, encoder_attention_mask)
    image = self.image_projection(image_embeds)
    # The refiner has moved the prompt in front of its padding.
    kept = torch.arange(text.shape[1], device=x.device) < encoder_attention_mask.sum(dim=1, keepdim=True, dtype=torch.int)
    mask = F.pad(kept, (x.shape[1] + image.shape[1], 0), value=True)[:, None, None]
    streams, rest = (x, torch.cat([image, text], dim=1)), (temb, mask, pair_tables(*table))
    for blocks in (self.transformer_blocks, self.single_transformer_blocks):
        streams = run_blocks(self, blocks, streams, *rest)
    return video(self, streams[0][:, -num_tokens:], temb, hidden_states.shape, return_dict)


FAMILY = Family(
    processors={hunyuan.HunyuanVideoAttnProcessor2_0: HunyuanVideoProcessor, AttnProcessor2_0: RefinerProcessor},
    forwards={
        AdaLayerNormContinuous: ada_layer_norm_continuous,
        AdaLayerNormZero: ada_layer_norm_zero,
        AdaLayerNormZeroSingle: ada_layer_norm_zero_single,
        GELU: gelu,
        nn.GELU: torch_gelu,
        hunyuan.HunyuanVideoIndividualTokenRefiner: refiner_blocks,
        hunyuan.HunyuanVideoIndividualTokenRefinerBlock: refiner_block,
        hunyuan.HunyuanVideoRotaryPosEmbed: rope,
        hunyuan.HunyuanVideoSingleTransformerBlock: _single_block,
        hunyuan.HunyuanVideoTokenRefiner: _refiner,
        hunyuan.HunyuanVideoTokenReplaceSingleTransformerBlock: _single_block,
        hunyuan.HunyuanVideoTokenReplaceTransformerBlock: _replaced_double_block,
        hunyuan.HunyuanVideoTransformerBlock: double_block,
        framepack.HunyuanVideoFramepackTransformer3DModel: _framepack,
    },
)
