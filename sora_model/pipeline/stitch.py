"""Putting a generated clip together with the videos that it goes on from: `Stitch`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stitch:
    """How a generated clip becomes one video with what it goes on from.

    A VAE does not return frames exactly as they were. Frames that both videos have are blended, which hides the cut.

    >>> Stitch(before=video, overlap=(5, 0)).apply(clip).shape                  # the clip's first 5 frames are the video's last 5
    torch.Size([3, 21, 48, 48])

    Args:
        before: [3, t, H, W], to be put in front of the clip.
        after: likewise behind it.
        overlap: how many of the clip's first frames `before` has too, and of its last frames `after`. Without `before` or `after`,
            how many frames are cut off there.
    """

    before: Tensor | None = None
    after: Tensor | None = None
    overlap: tuple[int, int] = (0, 0)

    def check(self, size: tuple[int, int, int]) -> None:
        """Raises ValueError where this does not fit a clip of `size` (T, H, W)."""
        frames, height, width = size
        if len(self.overlap) != 2 or min(self.overlap) < 0 or sum(self.overlap) > frames:
            raise ValueError(f"Stitch: overlap: expected two numbers >= 0, at most {frames} in all, got {self.overlap}")
        for name, video, shared in (("before", self.before, self.overlap[0]), ("after", self.after, self.overlap[1])):
            if video is None:
                continue
            fits = video.ndim == 4 and video.shape[0] == 3 and tuple(video.shape[2:]) == (height, width)
            if not fits or not video.is_floating_point() or video.shape[1] < shared:
                expected = f"floats [3, t, {height}, {width}] with the {shared} frames that the clip has too"
                raise ValueError(f"Stitch: {name}: expected {expected}, got {video.dtype} {list(video.shape)}")

    def apply(self, clip: Tensor) -> Tensor:
        """The clip [3, T, H, W] between `before` and `after`."""
        first, last = self.overlap
        head, body, tail = clip.split([first, clip.shape[1] - first - last, last], dim=1)
        parts = [body]
        if self.before is not None:
            alone, shared = self.before.to(clip).tensor_split([self.before.shape[1] - first], dim=1)
            parts = [alone, _blend(shared, head), *parts]
        if self.after is not None:
            shared, alone = self.after.to(clip).tensor_split([last], dim=1)
            parts = [*parts, _blend(tail, shared), alone]
        return torch.cat(parts, dim=1)


def _blend(first: Tensor, second: Tensor) -> Tensor:
    """A linear cross-fade from one version of the same frames [3, t, H, W] to the other."""
    weight = torch.arange(1, first.shape[1] + 1, device=first.device)[:, None, None] / (first.shape[1] + 1)
    return torch.lerp(first, second, weight.to(first))
