"""Sizes of clips: `Size`, and `Timing`, which says how many pixel frames make a token frame."""

from __future__ import annotations

from typing import NamedTuple

Size = tuple[int, int, int]  # (T, H, W): frames, height and width


class Timing(NamedTuple):
    """How pixel frames make token frames: `first` of them the first one, `stride` each other.

    >>> Timing(1, 4).whole(6)
    9

    A clip has first + stride * n frames, and so have keyframes at its start. Keyframes at its end have stride * n. A causal video
    VAE that compresses time by 4 has (1, 4) with patches of one latent frame; pixels without a VAE have (1, 1).
    """

    first: int
    stride: int

    def whole(self, frames: int) -> int:
        """The fewest frames that a clip can have, from `frames` on."""
        return self.first + self.stride * -(-max(frames - self.first, 0) // self.stride)

    def within(self, frames: int) -> int:
        """The most frames that a clip can have, up to `frames`; at least `first`."""
        return self.first + self.stride * (max(frames - self.first, 0) // self.stride)


def whole_size(size: Size, unit: Size, timing: Timing) -> Size:
    """The next size of whole tokens, which have `unit` pixels along H and W.

    >>> whole_size((6, 50, 80), (4, 8, 8), Timing(1, 4))
    (9, 56, 80)
    """
    frames, height, width = size
    return timing.whole(frames), -(-height // unit[1]) * unit[1], -(-width // unit[2]) * unit[2]
