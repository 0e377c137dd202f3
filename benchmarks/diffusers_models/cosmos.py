"""Cosmos Predict2 Video2World, 2B: 2,880 tokens of 5 latent frames that each have a noise level, 512 of text.

The mask of padded pixels comes as one more channel, as diffusers resizes it by torchvision.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import CosmosTransformer3DModel
from torch import nn


def build() -> nn.Module:
    return CosmosTransformer3DModel(
        in_channels=18, num_attention_heads=16, num_layers=1, concat_padding_mask=False, extra_pos_embed_type=None
    )


def inputs(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 18, 5, 48, 48, dtype=dtype),
        "timestep": torch.rand(1, 1, 5, 1, 1, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, 512, 1024, dtype=dtype),
        "fps": 16,
    }
