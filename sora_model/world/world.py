"""A small world of moving shapes, with captions and ground truth: scenes drawn by number from what a `WorldConfig` allows.

>>> scene = World(WorldConfig.simple()).sample(7)
>>> scene.caption()
'a blue circle moves down'
>>> scene.render(8, 32, 48).shape
torch.Size([3, 8, 32, 48])
"""

from __future__ import annotations

import zlib
from itertools import count

import numpy as np

from .config import COLORS, MOTIONS, SIZES, WorldConfig
from .scene import Scene, Thing
from .shapes import SHAPES, SPINNING


def held_out(color: str, shape: str, motion: str) -> bool:
    """Whether this combination is one of the tenth that is kept from training, to ask for what was never seen."""
    return zlib.crc32(f"{color} {shape} {motion}".encode()) % 10 == 0


class World:
    """Scenes by number: `World(config).sample(i)` is the same scene on every machine and in every run.

    split: "training" or "held out" (see `held_out`) for scenes whose first object is of that part; None for all.
    """

    def __init__(self, config: WorldConfig | None = None, *, split: str | None = None) -> None:
        if split not in (None, "training", "held out"):
            raise ValueError(f"World: split must be 'training', 'held out' or None, got {split!r}")
        self.config, self.split = config or WorldConfig(), split

    def sample(self, index: int, *, color: str | None = None, shape: str | None = None, motion: str | None = None) -> Scene:
        """Scene `index`; `color`, `shape` and `motion` fix those of its first object (to ask for one caption)."""
        for attempt in count():
            rng = np.random.default_rng((self.config.seed, index, attempt) if attempt else (self.config.seed, index))
            scene = self._draw(rng, color, shape, motion)
            first = scene.things[0]
            if self.split is None or held_out(first.color, first.shape, first.motion) == (self.split == "held out"):
                return scene
        raise AssertionError("unreachable")

    def motions(self, thing: Thing) -> tuple[str, ...]:
        """The ways an object may move without leaving this part of the world; all, if it has none here."""
        names = self.config.motions
        kept = [n for n in names if self.split is None or held_out(thing.color, thing.shape, n) == (self.split == "held out")]
        return tuple(kept) or names

    def _draw(self, rng: np.random.Generator, color: str | None, shape: str | None, motion: str | None) -> Scene:
        config = self.config

        def pick(names: tuple[str, ...]) -> str:
            return names[int(rng.integers(len(names)))]

        colors = [config.colors[i] for i in rng.permutation(len(config.colors))]
        if color is not None:
            colors = [color, *(name for name in colors if name != color)]
        things: list[Thing] = []
        for i in range(int(rng.integers(config.objects[0], config.objects[1] + 1))):
            kind, moves, change, size = (
                pick(config.shapes),
                pick(config.motions),
                pick(config.changes),
                pick(config.sizes),
            )
            if i == 0:
                kind, moves = shape or kind, motion or moves
            if kind not in SHAPES or moves not in MOTIONS or colors[i] not in COLORS:
                raise ValueError(
                    f"World.sample: unknown color, shape or motion in {colors[i]!r}, {kind!r}, {moves!r}; known "
                    f"are {list(COLORS)}, {list(SHAPES)} and {list(MOTIONS)}"
                )
            change = "none" if change == "spin" and kind not in SPINNING else change
            direction = np.array(MOTIONS[moves]) / max(np.hypot(*MOTIONS[moves]), 1)
            pace = rng.uniform(*config.speed)
            v = pace * direction
            travel = v * (config.room - 1)
            low, high = np.maximum(0, -travel), np.minimum(1, 1 - travel)
            low, high = np.where(low > high, 0, low), np.where(low > high, 1, high)
            for _ in range(8):  # a few tries to start apart from the others
                u = rng.uniform(low, high)
                if all(np.abs(u - other.u).max() > 0.35 for other in things):
                    break
            radius = SIZES[size] * rng.uniform(0.93, 1.07)
            things.append(Thing(colors[i], kind, moves, size, change, float(radius), tuple(u.tolist()), tuple(v.tolist()), pace))
        phase = tuple(rng.uniform(size=4).tolist())
        return Scene(tuple(things), pick(config.backgrounds), pick(config.cameras), phase, config)
