"""LTX-2: 3,072 tokens of 8 latent frames, 64 of audio, 1,024 of text."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import LTX2VideoTransformer3DModel
from torch import nn


def build() -> nn.Module:
    return LTX2VideoTransformer3DModel(num_layers=1, rope_type="split")


def inputs(dtype: torch.dtype) -> dict[str, Any]:
    mask = torch.ones(1, 1024, dtype=torch.int64)
    return {
        "hidden_states": torch.randn(1, 8 * 16 * 24, 128, dtype=dtype),
        "audio_hidden_states": torch.randn(1, 64, 128, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, 1024, 3840, dtype=dtype),
        "audio_encoder_hidden_states": torch.randn(1, 1024, 3840, dtype=dtype),
        "timestep": torch.tensor([[500.0]]),
        "audio_timestep": torch.tensor([500.0]),
        "encoder_attention_mask": mask,
        "audio_encoder_attention_mask": mask,
        "num_frames": 8,
        "height": 16,
        "width": 24,
        "audio_num_frames": 64,
    }
