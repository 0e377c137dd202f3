"""How much memory a call takes, from what its checkpoint's configs say: `memory`, `check_memory`, `check_pixels`.

Measured with the checkpoint that comes with the package, on a CPU, within 50% above. Other VAEs may take several times as much:
    transformer   52 float32 of width D for each token, both halves of guidance among them
    VAE           200 bytes for each pixel that it decodes at once
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import NamedTuple

from ..pipeline.parts import Outline
from ..sizes import Size

PROCESS = 5e8  # bytes of the libraries
TOKEN, DECODED, HELD = 52 * 4, 200, 24  # bytes: for D = 1; for a pixel in the decoder; for one that is decoded, then copied
PIXEL = 12  # bytes of a pixel of a video, which is held whatever else is


def tokens(outline: Outline, sizes: Sequence[Size]) -> int:
    """Of all videos, each made larger to whole tokens."""
    total = 0
    for size in sizes:
        frames, height, width = outline.padded(size)
        grid = 1 + (frames - outline.timing.first) // outline.timing.stride, height // outline.unit[1], width // outline.unit[2]
        total += math.prod(grid)
    return total


class Working(NamedTuple):
    """Bytes that the stages of a pass work in, one after the other, besides weights and videos."""

    transformer: float
    vae: float


def working(outline: Outline, sizes: Sequence[Size]) -> Working:
    from ..codec.tiles import AT_ONCE, TILE

    pixels = [math.prod(outline.padded(size)) for size in sizes]
    tiled = max(size[0] * min(size[1], TILE) * min(size[2], TILE) for size in sizes)
    return Working(TOKEN * outline.width * tokens(outline, sizes), DECODED * min(max(tiled, AT_ONCE), sum(pixels)))


def memory(outline: Outline, sizes: Sequence[Size], made: Sequence[Size] = ()) -> float:
    """Bytes, about, that one packed pass over videos of these sizes takes; made: videos that are held besides."""
    held = HELD * sum(math.prod(outline.padded(size)) for size in sizes) + PIXEL * sum(map(math.prod, made))
    return PROCESS + outline.weights + max(working(outline, sizes)) + held


def check_pixels(option: str, sizes: Sequence[Size], device: str) -> None:
    """Raises ValueError for videos that alone need more memory than the device has."""
    needed, there = min(PIXEL * sum(map(math.prod, sizes)), 10**30), installed(device)  # what a float can hold
    if needed > there:
        raise ValueError(
            f"{option}: expected videos that {'the memory' if device == 'cpu' else device} of {there / 1e9:.3g} GB can hold, "
            f"got {needed / 1e9:.3g} GB of pixels"
        )


def check_memory(option: str, needed: float, device: str) -> None:
    """Raises ValueError where even half of the estimate, which is too high by no more, is beyond the device."""
    there = installed(device)
    if needed > 2 * there:
        raise ValueError(
            f"{option}: expected videos for which {'the memory' if device == 'cpu' else device} of {there / 1e9:.3g} GB is enough, "
            f"got ones that take about {needed / 1e9:.3g} GB"
        )


def installed(device: str) -> int:
    """Bytes of memory that a device has."""
    if device == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    import torch

    return torch.cuda.get_device_properties(device).total_memory
