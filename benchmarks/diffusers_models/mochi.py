"""Mochi: 3,180 tokens of 2 latent frames in 480 x 848, 256 of text, 60 of them a prompt; two layers, as the last one differs."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import MochiTransformer3DModel
from torch import nn


def build() -> nn.Module:
    return MochiTransformer3DModel(num_layers=2)


def inputs(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 12, 2, 60, 106, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, 256, 4096, dtype=dtype),
        "timestep": torch.tensor([500]),
        "encoder_attention_mask": (torch.arange(256) < 60)[None],
    }
