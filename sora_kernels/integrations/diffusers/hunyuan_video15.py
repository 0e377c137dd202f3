"""HunyuanVideo-1.5: blocks of two streams, whose text is of two encoders and an image, each with its own mask.

diffusers sorts each sample's text by its mask on the host, and builds a mask of S x S in each layer. Text has no positions, so here
it stays where it is, behind the video, with one mask of keys for all layers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero
from diffusers.models.transformers import transformer_hunyuan_video15 as hunyuan
from diffusers.utils import apply_lora_scale
from torch import Tensor

from ...checks import fail
from .hunyuan_video import (
    HunyuanVideoProcessor,
    RefinerProcessor,
    double_block,
    refiner_block,
    refiner_blocks,
    rope,
    run_blocks,
    video,
)
from .parts import ada_layer_norm_continuous, ada_layer_norm_zero, gelu
from .patching import Family


class HunyuanVideo15Processor(HunyuanVideoProcessor):
    """The same. The forward of a derived class brings a mask of the text only, [B, T]."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        if attention_mask is not None and attention_mask.ndim == 2:
            attention_mask = F.pad(attention_mask.bool(), (hidden_states.shape[1], 0), value=True)[:, None, None]
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)


@apply_lora_scale("attention_kwargs")
def _model(
    self: Any,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_attention_mask: Tensor,
    timestep_r: Tensor | None = None,
    encoder_hidden_states_2: Tensor | None = None,
    encoder_attention_mask_2: Any = None,
    image_embeds: Any = None,
    attention_kwargs: dict[str, Any] | None = None,
    return_dict: bool = True,
) -> Any:
    batch = len(hidden_states)
    given = encoder_hidden_states, encoder_hidden_states_2, encoder_attention_mask, encoder_attention_mask_2, image_embeds
    names = "encoder_hidden_states", "encoder_hidden_states_2", "encoder_attention_mask", "encoder_attention_mask_2", "image_embeds"
    for name, tensor in zip(names, given, strict=True):
        if tensor is None or len(tensor) != batch:
            fail(type(self).__name__, name, f"a batch of {batch}", "None" if tensor is None else str(len(tensor)))
    x, temb = self.x_embedder(hidden_states), self.time_embed(timestep, timestep_r=timestep_r)
    image = self.image_embedder(image_embeds)
    glyphs = self.context_embedder_2(encoder_hidden_states_2)
    prompt = self.context_embedder(encoder_hidden_states, timestep, encoder_attention_mask)
    kinds = self.cond_type_embed(torch.arange(3, device=x.device))
    text = torch.cat([image + kinds[2], glyphs + kinds[1], prompt + kinds[0]], dim=1)
    # A batch of images that are all zero has none.
    image_mask = (image_embeds != 0).any().expand(image.shape[:2])
    mask = torch.cat([image_mask, encoder_attention_mask_2.bool(), encoder_attention_mask.bool()], dim=1)
    # The refiner divides by a prompt's length: no NaN may come out of one without tokens.
    text = torch.where(mask[..., None], text, 0)
    keys = F.pad(mask, (x.shape[1], 0), value=True)[:, None, None]
    x, _ = run_blocks(self, self.transformer_blocks, (x, text), temb, keys, self.rope(hidden_states))
    return video(self, x, temb, hidden_states.shape, return_dict)


FAMILY = Family(
    processors={hunyuan.HunyuanVideo15AttnProcessor2_0: HunyuanVideo15Processor, AttnProcessor2_0: RefinerProcessor},
    forwards={
        AdaLayerNormContinuous: ada_layer_norm_continuous,
        AdaLayerNormZero: ada_layer_norm_zero,
        GELU: gelu,
        hunyuan.HunyuanVideo15IndividualTokenRefiner: refiner_blocks,
        hunyuan.HunyuanVideo15IndividualTokenRefinerBlock: refiner_block,
        hunyuan.HunyuanVideo15RotaryPosEmbed: rope,
        hunyuan.HunyuanVideo15Transformer3DModel: _model,
        hunyuan.HunyuanVideo15TransformerBlock: double_block,
    },
)
