"""Between pixels and the latents that are diffused: the `Codec` interface, `PixelCodec`, and frames of one counted in the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..sizes import Size

Progress = Callable[[int, int], None]


class Codec(Protocol):
    """What a pipeline asks of a video VAE.

    channels: C of a latent. compression: pixels along T, H and W per latent position. causal: whether the first latent frame is
    one frame of pixels.
    encode: videos [3, T, H, W] in [-1, 1] -> latents [C, T', H/ch, W/cw], of any sizes, of about unit variance.
    decode: its inverse.
    progress: called with how much is done and how much there is, where coding takes its time.
    """

    channels: int
    compression: tuple[int, int, int]
    causal: bool

    def encode(self, videos: Sequence[Tensor], *, progress: Progress | None = None) -> list[Tensor]: ...

    def decode(self, latents: Sequence[Tensor], *, progress: Progress | None = None) -> list[Tensor]: ...


def latent_size(codec: Codec, size: Size) -> Size:
    """(T, H, W) of a video -> that of its latent; a size that does not divide is an error.

    >>> latent_size(vae, (13, 48, 80))                                    # compression (4, 8, 8), causal
    (4, 6, 10)
    """
    (frames, height, width), (ct, ch, cw) = size, codec.compression
    first = int(codec.causal)
    if frames < 1 or height < 1 or width < 1 or (frames - first) % ct or height % ch or width % cw:
        shape = f"{f'1 + {ct} n' if first else f'{ct} n'} frames of height {ch} n and width {cw} n"
        raise ValueError(f"latent_size: size: expected {shape}, got (T, H, W) = {size}")
    return first + (frames - first) // ct, height // ch, width // cw


def psnr(video: Tensor, other: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two videos in [-1, 1]."""
    return float(10 * torch.log10(4 / (video - other).square().mean().clamp(min=1e-10)))


def latent_frames(codec: Codec, frames: Tensor) -> Tensor:
    """Which latent frames are made of marked frames only: bool [T] -> bool [T']."""
    ct = codec.compression[0]
    if not codec.causal:
        return frames.unflatten(0, (-1, ct)).all(1)
    return torch.cat([frames[:1], frames[1:].unflatten(0, (-1, ct)).all(1)])


def pixel_frames(codec: Codec, frames: Tensor) -> Tensor:
    """The pixel frames of marked latent frames: bool [T'] -> bool [T]."""
    ct = codec.compression[0]
    if not codec.causal:
        return frames.repeat_interleave(ct)
    return torch.cat([frames[:1], frames[1:].repeat_interleave(ct)])


def nearest_known(video: Tensor, known: Tensor) -> Tensor:
    """Every frame that is not known shows the nearest one that is: [C, T, H, W] and bool [T] -> [C, T, H, W].

    Keyframes are encoded this way, so that a causal VAE sees no jump before those at the end.
    """
    places = known.nonzero().flatten()
    nearest = (torch.arange(len(known))[:, None] - places).abs().argmin(1)
    return video[:, places[nearest].to(video.device)]


class PixelCodec:
    """Latents are pixels, brought back into [-1, 1] on the way out."""

    channels = 3
    compression = (1, 1, 1)
    causal = False

    def encode(self, videos: Sequence[Tensor], *, progress: Progress | None = None) -> list[Tensor]:
        return list(videos)

    def decode(self, latents: Sequence[Tensor], *, progress: Progress | None = None) -> list[Tensor]:
        return [latent.clamp(-1, 1) for latent in latents]
