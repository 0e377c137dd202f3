"""Z-Image: a block of each kind, an image of 3,024 tokens, 512 of text."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ZImageTransformer2DModel
from torch import nn


def build() -> nn.Module:
    return ZImageTransformer2DModel(n_layers=1, n_refiner_layers=1)


def inputs(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "x": [torch.randn(16, 1, 108, 112, dtype=dtype)],
        "t": torch.tensor([0.5], dtype=dtype),
        "cap_feats": [torch.randn(512, 2560, dtype=dtype)],
    }
