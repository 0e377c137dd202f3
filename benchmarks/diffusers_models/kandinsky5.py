"""Kandinsky 5 Lite, 2B: 2,880 tokens of 5 latent frames, 256 of text; one block of text and one of video."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import Kandinsky5Transformer3DModel
from torch import nn


def build() -> nn.Module:
    model = Kandinsky5Transformer3DModel(
        in_visual_dim=16, out_visual_dim=16, model_dim=1792, ff_dim=7168, num_text_blocks=1, num_visual_blocks=1
    )
    for name, module in model.named_modules():
        if name.split(".")[-1] in model._keep_in_fp32_modules:  # by from_pretrained; with other dtypes the model fails
            module._apply = partial(_stay, module)
    return model


def _stay(module: nn.Module, *_: Any, **__: Any) -> nn.Module:
    return module


def inputs(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 5, 48, 48, 16, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, 256, 3584, dtype=dtype),
        "timestep": torch.tensor([500.0]),
        "pooled_projections": torch.randn(1, 768, dtype=dtype),
        "visual_rope_pos": [torch.arange(5), torch.arange(24), torch.arange(24)],
        "text_rope_pos": torch.arange(256),
    }
