"""Qwen-Image: a block, 3,024 tokens of image, 512 of text, of which 100 are padding."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from torch import nn


def build() -> nn.Module:
    return QwenImageTransformer2DModel(num_layers=1)


def inputs(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 3024, 64, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, 512, 3584, dtype=dtype),
        "encoder_hidden_states_mask": torch.arange(512)[None] < 412,
        "timestep": torch.tensor([0.5], dtype=dtype),
        "img_shapes": [[(1, 54, 56)]],
    }
