"""DiT-XL/2: a block, 12 images of 256 tokens."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import nn


def build() -> nn.Module:
    return DiTTransformer2DModel(num_layers=1)


def inputs(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(12, 4, 32, 32, dtype=dtype),
        "timestep": torch.full((12,), 500),
        "class_labels": torch.arange(12),
    }
