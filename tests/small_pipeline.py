"""A pipeline that is trained in no time."""

from __future__ import annotations

import torch

from sora_model import SoraPipeline
from sora_model.model.config import DiTConfig
from sora_model.model.dit import DiT
from sora_model.text.words import WordEncoder


def small_pipeline() -> SoraPipeline:
    torch.manual_seed(0)
    text = WordEncoder(dim=16, num_heads=2, buckets=32)
    base = SoraPipeline.from_preset("tiny", patch=(1, 8, 8), text_encoder=text)
    config = {**base.dit.config.to_dict(), "depth": 1, "hidden_size": 32, "num_heads": 2}
    return base.replaced(dit=DiT(DiTConfig.from_dict(config)), size=(2, 16, 16))
