"""Latte: a spatial and a temporal block, 4,096 tokens of 16 latent frames, 120 of text."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import LatteTransformer3DModel
from torch import nn


def build() -> nn.Module:
    return LatteTransformer3DModel(
        num_attention_heads=16,
        attention_head_dim=72,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=1152,
        attention_bias=True,
        sample_size=64,
        patch_size=2,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=4096,
        video_length=16,
    )


def inputs(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 4, 16, 32, 32, dtype=dtype),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 120, 4096, dtype=dtype),
    }
