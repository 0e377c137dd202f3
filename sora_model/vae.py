"""Between pixels and the latents that are diffused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Codec(Protocol):
    """What a pipeline asks of a video VAE.

    channels: C of a latent. compression: pixels along T, H and W per latent position.
    encode: videos [3, T, H, W] in [-1, 1] -> latents [C, T/ct, H/ch, W/cw], of any sizes. decode: its inverse.
    """

    channels: int
    compression: tuple[int, int, int]

    def encode(self, videos: Sequence[Tensor]) -> list[Tensor]: ...

    def decode(self, latents: Sequence[Tensor]) -> list[Tensor]: ...


class PixelCodec:
    """Latents are pixels, brought back into [-1, 1] on the way out."""

    channels = 3
    compression = (1, 1, 1)

    def encode(self, videos: Sequence[Tensor]) -> list[Tensor]:
        return list(videos)

    def decode(self, latents: Sequence[Tensor]) -> list[Tensor]:
        return [latent.clamp(-1, 1) for latent in latents]
