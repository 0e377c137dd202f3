"""Two transformers of one model, of which each has its noise levels: `Experts`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .block import Window
from .conditioning import PackedText, Samples
from .dit import DiT
from .step_cache import CachedSamples


class Experts(nn.Module):
    """A `DiT` for high noise and one for low noise, as Wan 2.2's A14B has them.

    Args:
        high: predicts where the timestep is at least `boundary`.
        low: predicts below it.
        boundary: a timestep.
    """

    def __init__(self, high: DiT, low: DiT, boundary: float) -> None:
        super().__init__()
        if high.config != low.config:
            differ = [name for name, value in high.config.to_dict().items() if getattr(low.config, name) != value]
            raise ValueError(f"Experts: low: expected the config of high, got another {', '.join(differ)}")
        self.high, self.low, self.boundary, self.config = high, low, boundary, high.config

    @property
    def final(self) -> nn.Linear:
        return self.high.final

    @property
    def gradient_checkpointing(self) -> bool:
        return self.high.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self.high.gradient_checkpointing = self.low.gradient_checkpointing = value

    def forward(
        self,
        latents: Sequence[Tensor],
        timesteps: Tensor,
        text: PackedText | None = None,
        labels: None = None,
        frame_steps: Sequence[float] | None = None,
        image_tokens: Sequence[Tensor] | None = None,
        *,
        window: Window | None = None,
        cache: CachedSamples | None = None,
    ) -> list[Tensor]:
        """As `DiT.forward`, each sample by its expert. Of several timesteps the highest decides: those of clean frames are 0."""
        samples, pt = Samples(latents, timesteps, text, labels, frame_steps, image_tokens), self.config.patch_size[0]
        is_high = (torch.stack([level.max() for level in samples.levels(pt)]) >= self.boundary).tolist()
        outputs: list[Any] = [None] * len(latents)
        for expert, wanted in ((self.high, True), (self.low, False)):
            which = [i for i, high in enumerate(is_high) if high == wanted]
            if which:
                of_expert = None if cache is None else cache.select(which)
                found = expert(*samples.select(which, pt), window=window, cache=of_expert)
                for i, output in zip(which, found, strict=True):
                    outputs[i] = output
        return outputs
