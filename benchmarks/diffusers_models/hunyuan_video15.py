"""HunyuanVideo-1.5: 2,880 tokens of 5 latent frames; 1,000 of a prompt and 256 of glyphs, mostly padding, and 729 of no image."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import HunyuanVideo15Transformer3DModel
from torch import nn


def build() -> nn.Module:
    return HunyuanVideo15Transformer3DModel(num_layers=1)


def inputs(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 65, 5, 24, 24, dtype=dtype),
        "timestep": torch.tensor([500.0], dtype=dtype),
        "encoder_hidden_states": torch.randn(1, 1000, 3584, dtype=dtype),
        "encoder_attention_mask": (torch.arange(1000) < 120)[None].long(),
        "encoder_hidden_states_2": torch.randn(1, 256, 1472, dtype=dtype),
        "encoder_attention_mask_2": torch.zeros(1, 256, dtype=torch.long),
        "image_embeds": torch.zeros(1, 729, 1152, dtype=dtype),
    }
