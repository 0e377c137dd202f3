"""DiT and Latte: diffusers' BasicTransformerBlock with rows of modulation, and its attention that knows no backends."""

from __future__ import annotations

from typing import Any

from diffusers.models.activations import GELU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.normalization import AdaLayerNormZero
from torch import Tensor

from .parts import Processor, ada_layer_norm_zero, attend, gate, gate_norm_modulate, gelu, is_norm, mask_of_heads, norm_modulate
from .patching import Family


class BasicProcessor(Processor):
    """Self-attention, and cross-attention to text. These models have no norms of queries and keys."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in projected)
        mask = mask_of_heads(attention_mask, query.shape[0], attn.heads)
        out = attend(self, query, key, value, mask, parallel_config=self._parallel_config)
        return attn.to_out[1](attn.to_out[0](out.type_as(query)))


def _block(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Any = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
) -> Tensor:
    """That of DiT has "ada_norm_zero", that of Latte "ada_norm_single". Of others only attention and GELU are replaced."""
    x = hidden_states
    if cross_attention_kwargs or self._chunk_size is not None or self.pos_embed is not None:
        pass
    elif self.norm_type == "ada_norm_zero" and self.attn2 is None and is_norm(self.norm3):
        y, gate_, mlp_shift, mlp_scale, mlp_gate = self.norm1(x, timestep, class_labels, hidden_dtype=x.dtype)
        out = self.attn1(y, encoder_hidden_states=None, attention_mask=attention_mask)
        x, y = gate_norm_modulate(self.norm3, x, out, gate_, mlp_shift, mlp_scale)
        return gate(x, self.ff(y), mlp_gate)
    elif self.norm_type == "ada_norm_single" and is_norm(self.norm1) and is_norm(self.norm2):
        rows = self.scale_shift_table + timestep.unflatten(1, (6, -1))
        shift, scale, gate_, mlp_shift, mlp_scale, mlp_gate = rows.unbind(1)
        out = self.attn1(norm_modulate(self.norm1, x, shift, scale), encoder_hidden_states=None, attention_mask=attention_mask)
        if self.attn2 is not None:
            x, gate_ = gate(x, out, gate_), None
            out = self.attn2(x, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask)
        x, y = gate_norm_modulate(self.norm2, x, out, gate_, mlp_shift, mlp_scale)
        return gate(x, self.ff(y), mlp_gate)
    return type(self).forward(
        self,
        x,
        attention_mask,
        encoder_hidden_states,
        encoder_attention_mask,
        timestep,
        cross_attention_kwargs,
        class_labels,
        added_cond_kwargs,
    )


FAMILY = Family(
    processors={AttnProcessor2_0: BasicProcessor},
    forwards={AdaLayerNormZero: ada_layer_norm_zero, BasicTransformerBlock: _block, GELU: gelu},
)
