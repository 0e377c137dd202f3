"""CogVideoX 5B: 2,700 tokens of 2 latent frames in 480 x 720, 226 of text."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import nn


def build() -> nn.Module:
    return CogVideoXTransformer3DModel(num_attention_heads=48, num_layers=1, use_rotary_positional_embeddings=True)


def inputs(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 2, 16, 60, 90, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, 226, 4096, dtype=dtype),
        "timestep": torch.tensor([500]),
        "image_rotary_emb": get_3d_rotary_pos_embed(64, ((0, 0), (30, 45)), (30, 45), 2, device=torch.device("cpu")),
    }
