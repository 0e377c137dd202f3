"""Flux 1 dev: a double and a single block, 3,024 tokens of image, 512 of text."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import nn


def build() -> nn.Module:
    return FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)


def inputs(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 3024, 64, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, 512, 4096, dtype=dtype),
        "pooled_projections": torch.randn(1, 768, dtype=dtype),
        "timestep": torch.tensor([0.5], dtype=dtype),
        "guidance": torch.tensor([3.5], dtype=dtype),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(54.0), torch.arange(56.0)),
        "txt_ids": torch.zeros(512, 3),
    }
