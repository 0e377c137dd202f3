"""Coding in pieces: batches of equal sizes, and tiles of frames that are too large."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

AT_ONCE = 2**22  # numbers of pixels that are coded at once, unless one video has more
TILE, OVERLAP = 512, 64  # pixels along a side of what is coded at once, and how many two neighbours share


def by_size(videos: Sequence[Tensor], code: Callable[[Tensor], Tensor], at_once: int) -> list[Tensor]:
    """code on batches of equal sizes, each of at most `at_once` numbers, back in the order of `videos`."""
    groups: dict[torch.Size, list[int]] = {}
    for i, video in enumerate(videos):
        groups.setdefault(video.shape, []).append(i)
    coded: dict[int, Tensor] = {}
    for shape, members in groups.items():
        count = max(at_once // math.prod(shape), 1)
        for start in range(0, len(members), count):
            some = members[start : start + count]
            coded.update(zip(some, code(torch.stack([videos[i] for i in some])).unbind(0), strict=True))
    return [coded[i] for i in range(len(videos))]


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin, so that neighbours share `overlap` or more and the last one ends at `length`."""
    return [*range(0, max(length - tile, 0), tile - overlap), max(length - tile, 0)]


def ramp(length: int, overlap: int) -> Tensor:
    """Weights that rise over the first `overlap` positions and fall over the last."""
    place = torch.arange(length) + 0.5
    return torch.minimum(place, length - place).div(max(overlap, 1)).clamp(max=1)


class Watch:
    """Tells `progress` how many positions of videos or latents are coded, of how many, overlaps of tiles counted twice."""

    def __init__(self, videos: Sequence[Tensor], tile: int, overlap: int, progress: Callable[[int, int], None] | None) -> None:
        self.progress, self.done = progress, 0
        sides = [[sum(min(tile, n) for _ in tile_starts(n, tile, overlap)) for n in video.shape[2:]] for video in videos]
        self.total = sum(video.shape[1] * height * width for video, (height, width) in zip(videos, sides, strict=True))

    def __call__(self, part: Tensor) -> None:
        """After a tile [B, C, T, H, W]."""
        self.done += part.numel() // part.shape[1]
        if self.progress is not None:
            self.progress(self.done, self.total)
