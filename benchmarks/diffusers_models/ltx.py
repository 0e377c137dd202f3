"""LTX-Video, 2B: 3,072 tokens of 8 latent frames, 128 of text, of which 40 count."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import LTXVideoTransformer3DModel
from torch import nn


def build() -> nn.Module:
    return LTXVideoTransformer3DModel(num_layers=1)


def inputs(dtype: torch.dtype) -> dict[str, Any]:
    mask = torch.zeros(1, 128)
    mask[:, :40] = 1
    return {
        "hidden_states": torch.randn(1, 8 * 16 * 24, 128, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, 128, 4096, dtype=dtype),
        "timestep": torch.tensor([500]),
        "encoder_attention_mask": mask,
        "num_frames": 8,
        "height": 16,
        "width": 24,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }
