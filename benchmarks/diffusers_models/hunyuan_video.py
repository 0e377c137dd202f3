"""HunyuanVideo: 2,880 tokens of 5 latent frames, 256 of text, of which a prompt takes 60; a block of two streams and one of one."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import nn


def build() -> nn.Module:
    return HunyuanVideoTransformer3DModel(num_layers=1, num_single_layers=1)


def inputs(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 16, 5, 48, 48, dtype=dtype),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 256, 4096, dtype=dtype),
        "encoder_attention_mask": (torch.arange(256) < 60)[None].long(),
        "pooled_projections": torch.randn(1, 768, dtype=dtype),
        "guidance": torch.tensor([6000.0], dtype=dtype),
    }
