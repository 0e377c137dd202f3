"""Two transformers of one model, of which each has its noise levels: `Experts`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .dit import DiT


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

    def forward(self, latents: Any, timesteps: Tensor, *args: Any, **kwargs: Any) -> list[Tensor]:
        """As `DiT.forward`; the highest of the timesteps decides, as those of clean frames are 0."""
        expert = self.high if timesteps.max() >= self.boundary else self.low
        return expert(latents, timesteps, *args, **kwargs)
