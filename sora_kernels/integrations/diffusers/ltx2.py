"""LTX-2: video and audio side by side, each with self-attention, text and the other one; RoPE of pairs or of halves."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers.models.activations import GELU
from diffusers.models.transformers import transformer_ltx2
from torch import Tensor, nn

from .parts import (
    Processor,
    Tables,
    attend,
    fuses_norms,
    gate,
    gate_norm_modulate,
    gelu,
    mask_of_heads,
    norm_modulate,
    pair_tables,
    qk_norm_rope,
    text_keys,
)
from .patching import Family


class LTX2Processor(Processor):
    """All attentions. A perturbed one gives values instead, and here it does so without reading which samples are perturbed."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        query_rotary_emb: Tables | None = None,
        key_rotary_emb: Tables | None = None,
        perturbation_mask: Tensor | None = None,
        all_perturbed: Tensor | bool | None = None,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        out = values = attn.to_v(context)
        if all_perturbed is not True:
            if query_rotary_emb is None or key_rotary_emb is None:
                key_rotary_emb = query_rotary_emb
            query = _rotated(attn, attn.norm_q, attn.to_q(hidden_states), query_rotary_emb)
            key = _rotated(attn, attn.norm_k, attn.to_k(context), key_rotary_emb)
            mask = mask_of_heads(attention_mask, query.shape[0], attn.heads)
            value = values.unflatten(2, (attn.heads, -1))
            out = attend(self, query, key, value, mask, parallel_config=self._parallel_config).type_as(query)
            if perturbation_mask is not None:
                out = torch.lerp(values, out, perturbation_mask.to(values))
        if attn.to_gate_logits is not None:
            gates = 2 * attn.to_gate_logits(hidden_states).sigmoid()  # of heads, [B, S, H]
            out = (out.unflatten(2, (attn.heads, -1)) * gates[..., None]).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


def _rotated(attn: Any, norm: nn.Module, x: Tensor, tables: Tables | None) -> Tensor:
    """Queries or keys [B, S, D] -> [B, S, H, d]. The tables may be of other heads than the attention's."""
    split = attn.rope_type == "split"
    heads = attn.heads
    if tables is not None:
        cos, sin = tables if split else (table.unflatten(1, (heads, -1)) for table in tables)
        heads, tables = cos.shape[1], (cos, sin)
    x = qk_norm_rope(norm, x.unflatten(2, (heads, -1)), tables, across_heads=True, interleaved=not split)
    return x.flatten(2).unflatten(2, (attn.heads, -1))


def _rope(self: Any, coords: Tensor, device: Any = None) -> Tables:
    """For pairs [B*S, D/2], of diffusers' [B, S, D]; for halves [B*S, H, d/2], of diffusers' [B, H, S, d/2]."""
    cos, sin = type(self).forward(self, coords, device)
    if self.rope_type != "split":
        return pair_tables(cos.flatten(0, 1), sin.flatten(0, 1))
    cos, sin = (table.transpose(1, 2).flatten(0, 1).contiguous() for table in (cos, sin))
    return cos, sin


class _Stream(NamedTuple):
    """Video or audio. The next norm adds what the last layer gave, so that both are one kernel."""

    x: Tensor
    out: Tensor | None = None
    """What is still to be added to x, if anything."""
    gate: Tensor | None = None


def _add_norm_modulate(norm: nn.Module, stream: _Stream, shift: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """x with what was to be added, and its norm modulated."""
    x, out, gate_ = stream
    if out is None:
        return x, norm_modulate(norm, x, shift, scale)
    if gate_ is None or shift is None or gate_.shape == shift.shape:
        return gate_norm_modulate(norm, x, out, gate_, shift, scale)
    x = gate(x, out, gate_)  # rows of tokens beside rows of samples
    return x, norm_modulate(norm, x, shift, scale)


def _text(
    self: Any,
    kind: str,
    x: Tensor,
    text: Tensor,
    temb: Tensor,
    temb_prompt: Tensor | None,
    mask: Tensor | None,
    text_mask: Tensor | None,
    **self_attention: Any,
) -> tuple[_Stream, tuple[Tensor, ...]]:
    """Self-attention and cross-attention to text, of video ("") or "audio_"; and shift, scale and gate of its feed-forward."""

    def part(name: str) -> Any:
        return getattr(self, kind + name)

    rows = self.get_mod_params(part("scale_shift_table"), temb, x.shape[0])
    shift, scale, gate_ = rows[:3]
    q_shift, q_scale, q_gate = rows[6:] or (None, None, None)
    if self.cross_attn_adaln:
        table = part("prompt_scale_shift_table")
        if temb_prompt is None:
            k_shift, k_scale = table.to(x.device, x.dtype)
        else:
            k_shift, k_scale = self.get_mod_params(table, temb_prompt, x.shape[0])
        text = text * (1 + k_scale) + k_shift
    out = part("attn1")(norm_modulate(part("norm1"), x, shift, scale), attention_mask=mask, **self_attention)
    x, y = gate_norm_modulate(part("norm2"), x, out, gate_, q_shift, q_scale)
    out = part("attn2")(y, encoder_hidden_states=text, attention_mask=text_mask)
    return _Stream(x, out, q_gate), rows[3:6]


Rows = tuple[Tensor, Tensor]
"""Embeddings of the time for scales and shifts, and for the gate."""
Options = dict[str, Any] | None
"""Tables and mask of an attention."""


def _audio_to_video_and_back(
    self: Any, video: _Stream, audio: _Stream, video_temb: Rows, audio_temb: Rows, to_video: Options, to_audio: Options
) -> tuple[_Stream, _Stream]:
    """Cross-attention of video to audio and of audio to video. One whose options are None is skipped."""
    batch = video.x.shape[0]

    def rows(table: Tensor, temb: Rows) -> tuple[Tensor, ...]:
        """Scale and shift for audio to video, scale and shift for video to audio, gate."""
        shifts_and_scales, of_gate = temb
        return *self.get_mod_params(table[:4], shifts_and_scales, batch), *self.get_mod_params(table[4:], of_gate, batch)

    v_scale, v_shift, v_scale_a, v_shift_a, v_gate = rows(self.video_a2v_cross_attn_scale_shift_table, video_temb)
    a_scale_v, a_shift_v, a_scale, a_shift, a_gate = rows(self.audio_a2v_cross_attn_scale_shift_table, audio_temb)
    x, video_query = _add_norm_modulate(self.audio_to_video_norm, video, v_shift, v_scale)
    y, audio_query = _add_norm_modulate(self.video_to_audio_norm, audio, a_shift, a_scale)
    video, audio = _Stream(x), _Stream(y)
    if to_video is not None:
        context = norm_modulate(self.video_to_audio_norm, y, a_shift_v, a_scale_v)
        video = _Stream(x, self.audio_to_video_attn(video_query, encoder_hidden_states=context, **to_video), v_gate)
    if to_audio is not None:
        context = norm_modulate(self.audio_to_video_norm, x, v_shift_a, v_scale_a)
        audio = _Stream(y, self.video_to_audio_attn(audio_query, encoder_hidden_states=context, **to_audio), a_gate)
    return video, audio


_NORMS = "norm1", "norm2", "norm3", "audio_norm1", "audio_norm2", "audio_norm3", "audio_to_video_norm", "video_to_audio_norm"


@fuses_norms(*_NORMS)
def _block(
    self: Any,
    hidden_states: Tensor,
    audio_hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    audio_encoder_hidden_states: Tensor,
    temb: Tensor,
    temb_audio: Tensor,
    temb_ca_scale_shift: Tensor,
    temb_ca_audio_scale_shift: Tensor,
    temb_ca_gate: Tensor,
    temb_ca_audio_gate: Tensor,
    temb_prompt: Tensor | None = None,
    temb_prompt_audio: Tensor | None = None,
    video_rotary_emb: Tables | None = None,
    audio_rotary_emb: Tables | None = None,
    ca_video_rotary_emb: Tables | None = None,
    ca_audio_rotary_emb: Tables | None = None,
    encoder_attention_mask: Tensor | None = None,
    audio_encoder_attention_mask: Tensor | None = None,
    self_attention_mask: Tensor | None = None,
    audio_self_attention_mask: Tensor | None = None,
    a2v_cross_attention_mask: Tensor | None = None,
    v2a_cross_attention_mask: Tensor | None = None,
    use_a2v_cross_attention: bool = True,
    use_v2a_cross_attention: bool = True,
    perturbation_mask: Tensor | None = None,
    all_perturbed: Tensor | bool | None = None,
) -> tuple[Tensor, Tensor]:
    perturbed = {"perturbation_mask": perturbation_mask, "all_perturbed": all_perturbed} if self.perturbed_attn else {}
    video, video_rows = _text(
        self,
        "",
        hidden_states,
        encoder_hidden_states,
        temb,
        temb_prompt,
        self_attention_mask,
        encoder_attention_mask,
        query_rotary_emb=video_rotary_emb,
        **perturbed,
    )
    audio, audio_rows = _text(
        self,
        "audio_",
        audio_hidden_states,
        audio_encoder_hidden_states,
        temb_audio,
        temb_prompt_audio,
        audio_self_attention_mask,
        audio_encoder_attention_mask,
        query_rotary_emb=audio_rotary_emb,
        **perturbed,
    )
    if use_a2v_cross_attention or use_v2a_cross_attention:
        times = (temb_ca_scale_shift, temb_ca_gate), (temb_ca_audio_scale_shift, temb_ca_audio_gate)
        to_video = _options(ca_video_rotary_emb, ca_audio_rotary_emb, a2v_cross_attention_mask)
        to_audio = _options(ca_audio_rotary_emb, ca_video_rotary_emb, v2a_cross_attention_mask)
        used = to_video if use_a2v_cross_attention else None, to_audio if use_v2a_cross_attention else None
        video, audio = _audio_to_video_and_back(self, video, audio, *times, *used)
    shift, scale, gate_ = video_rows
    x, y = _add_norm_modulate(self.norm3, video, shift, scale)
    x = gate(x, self.ff(y), gate_)
    shift, scale, gate_ = audio_rows
    audio_x, y = _add_norm_modulate(self.audio_norm3, audio, shift, scale)
    return x, gate(audio_x, self.audio_ff(y), gate_)


def _options(query_tables: Tables | None, key_tables: Tables | None, mask: Tensor | None) -> dict[str, Any]:
    return {"query_rotary_emb": query_tables, "key_rotary_emb": key_tables, "attention_mask": mask}


def _model(
    self: Any,
    hidden_states: Tensor,
    audio_hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    audio_encoder_hidden_states: Tensor,
    timestep: Tensor,
    audio_timestep: Tensor | None = None,
    sigma: Tensor | None = None,
    audio_sigma: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    audio_encoder_attention_mask: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    keys = text_keys(encoder_attention_mask)
    # Of the pipeline, both are the same mask: so they stay, and it is packed once for all layers.
    shared = audio_encoder_attention_mask is encoder_attention_mask
    audio_keys = keys if shared else text_keys(audio_encoder_attention_mask)
    states = hidden_states, audio_hidden_states, encoder_hidden_states, audio_encoder_hidden_states
    times = timestep, audio_timestep, sigma, audio_sigma
    return type(self).forward(self, *states, *times, keys, audio_keys, *args, **kwargs)


FAMILY = Family(
    processors={
        transformer_ltx2.LTX2AudioVideoAttnProcessor: LTX2Processor,
        transformer_ltx2.LTX2PerturbedAttnProcessor: LTX2Processor,
    },
    forwards={
        GELU: gelu,
        transformer_ltx2.LTX2AudioVideoRotaryPosEmbed: _rope,
        transformer_ltx2.LTX2VideoTransformer3DModel: _model,
        transformer_ltx2.LTX2VideoTransformerBlock: _block,
    },
)
