"""Flux 2 Klein, 4B: a double and a single block, 3,024 tokens of image, 512 of text."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import Flux2Transformer2DModel
from torch import nn


def build() -> nn.Module:
    return Flux2Transformer2DModel(
        num_layers=1, num_single_layers=1, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
    )


def inputs(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 3024, 128, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, 512, 7680, dtype=dtype),
        "timestep": torch.tensor([0.5], dtype=dtype),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(54.0), torch.arange(56.0), torch.zeros(1)),
        "txt_ids": torch.cartesian_prod(*[torch.zeros(1)] * 3, torch.arange(512.0)),
    }
