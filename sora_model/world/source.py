"""Clips of a world as a source of training data: `WorldSource`."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate

import numpy as np

from ..data.sample import Sample
from ..sizes import Size, Timing
from .lessons import closeup, drift, link, morph, turn
from .world import World

GOLDEN, SILVER = 0x9E3779B97F4A7C15, 0x6A09E667F3BCC909  # the fractions of (1 + sqrt 5) / 2 and of sqrt 2, in 2^-64
PIXELS = Timing(1, 1)
LESSON_CLIPS = {"drift": drift, "turn": turn, "link": link, "morph": morph, "closeup": closeup}


class WorldSource:
    """Endless scenes of a world, drawn at mixed sizes.

    >>> source = WorldSource(World(), [(8, 32, 32), (8, 24, 40), (8, 40, 24), (1, 32, 32)], weights=[3, 2, 2, 1])
    >>> sample = source.load(0)  # in [-1, 1]
    >>> sample.video.shape, sample.caption
    (torch.Size([3, 8, 32, 32]), 'a blue circle moves left')

    sizes: (T, H, W) to draw from; T = 1 is an image, whose caption names no motion. weights: how often each is offered,
    relative (default: alike); a budget of few samples takes small ones more often than that, as they fill it up.
    lessons: shares of the clips that teach a task, by name; see `lessons.py`.
    timing: of the model, for masks of whole token frames.
    """

    def __init__(
        self,
        world: World,
        sizes: Sequence[Size],
        *,
        weights: Sequence[float] | None = None,
        lessons: Mapping[str, float] | None = None,
        timing: Timing = PIXELS,
    ) -> None:
        weights = [1.0] * len(sizes) if weights is None else list(weights)
        if not sizes or any(len(size) != 3 or min(size) < 1 for size in sizes):
            raise ValueError(f"WorldSource: sizes must be a list of (T, H, W), each at least 1, got {sizes}")
        if len(weights) != len(sizes) or min(weights) <= 0:
            raise ValueError(f"WorldSource: need a weight above 0 for each of {len(sizes)} sizes, got {weights}")
        lessons = dict(lessons or {})
        if not set(lessons) <= set(LESSON_CLIPS) or min(lessons.values(), default=0) < 0 or sum(lessons.values()) > 1:
            raise ValueError(
                f"WorldSource: lessons: expected shares of {', '.join(LESSON_CLIPS)}, >= 0 and at most 1 in all, got {lessons}"
            )
        self._lessons, self.timing = list(zip(lessons, accumulate(lessons.values()), strict=True)), timing
        self.world, self.sizes = world, [(t, h, w) for t, h, w in sizes]
        self._bounds = [bound / sum(weights) for bound in accumulate(weights)][:-1]

    def size(self, index: int) -> Size:
        return self.sizes[bisect_right(self._bounds, _spread(index, GOLDEN))]

    def load(self, index: int, epoch: int = 0) -> Sample:
        size = self.size(index)
        scene = self.world.sample(index)
        drawn = _spread(index, SILVER)
        for name, bound in self._lessons if size[0] > self.timing.first else ():
            if drawn < bound:
                rng = np.random.default_rng((self.world.config.seed, index, 2**32))
                return Sample(*LESSON_CLIPS[name](scene, size, self.timing, self.world, rng))
        return Sample(scene.render(*size), scene.caption(frames=size[0]), scene.caption(True, size[0]))


def _spread(index: int, ratio: int) -> float:
    """A number in [0, 1) per index; those of consecutive indices lie evenly, and so does any few of them."""
    return index * ratio % 2**64 / 2**64
