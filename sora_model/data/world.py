"""A small world of moving shapes, with captions and ground truth: scenes drawn by number from what a `WorldConfig` allows.

world = World(WorldConfig.simple())
scene = world.sample(7)
scene.caption()                  # "a blue circle moves down"
scene.render(8, 32, 48)          # float32 [3, 8, 32, 48] in [-1, 1]
judge(scene.render(8, 32, 48), scene.truth(8, 32, 48))["correct"]      # True
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from itertools import count

import numpy as np

from sora_model.data.scene import BACKGROUNDS, CAMERAS, CHANGES, COLORS, MOTIONS, SIZES, Scene, Thing
from sora_model.data.shapes import SHAPES, SPINNING


@dataclass(frozen=True)
class WorldConfig:
    """What a world may contain. Every field is plain data, so a config survives JSON: `WorldConfig(**json.load(f))`.

    colors, shapes, motions, sizes, backgrounds, cameras, changes: names to choose from, uniformly (see the tables above).
    objects: fewest and most objects in a scene; colours within a scene differ.
    texture: strength of the pattern on the background, 0 to 0.1 of the brightness range; it makes a panning camera visible.
    speed: slowest and fastest motion, as a fraction of the free range per frame.
    room: frames an object can travel before it meets a border, speed permitting; longer clips show it bounce.
    """

    colors: tuple[str, ...] = ("red", "green", "blue")
    shapes: tuple[str, ...] = ("circle", "square", "triangle")
    motions: tuple[str, ...] = ("left", "right", "up", "down")
    sizes: tuple[str, ...] = ("medium",)
    backgrounds: tuple[str, ...] = ("black",)
    cameras: tuple[str, ...] = ("still",)
    changes: tuple[str, ...] = ("none",)
    objects: tuple[int, int] = (1, 1)
    texture: float = 0.0
    speed: tuple[float, float] = (0.06, 0.09)
    room: int = 8
    seed: int = 0

    @classmethod
    def simple(cls, seed: int = 0) -> WorldConfig:
        """One large object of 3 colours, 3 shapes and 4 motions crosses black in six frames: learnable in minutes on a CPU."""
        return cls(sizes=("large",), speed=(0.17, 0.2), room=6, seed=seed)

    @classmethod
    def studio(cls, seed: int = 0) -> WorldConfig:
        """One object of 8 colours, 7 shapes and 9 motions crosses one of 5 plain backgrounds in 13 frames."""
        return cls(
            colors=tuple(COLORS),
            shapes=SHAPES[:7],
            motions=tuple(MOTIONS),
            sizes=("medium", "large"),
            backgrounds=tuple(BACKGROUNDS),
            speed=(0.05, 0.08),
            room=13,
            seed=seed,
        )

    @classmethod
    def rich(cls, seed: int = 0) -> WorldConfig:
        """Everything the world has: up to three objects, digits, panning cameras, textured backgrounds, spin and growth."""
        return cls(
            colors=tuple(COLORS),
            shapes=SHAPES,
            motions=tuple(MOTIONS),
            sizes=tuple(SIZES),
            changes=CHANGES,
            seed=seed,
            backgrounds=tuple(BACKGROUNDS),
            cameras=tuple(CAMERAS),
            objects=(1, 3),
            texture=0.06,
            speed=(0.04, 0.09),
        )

    def __post_init__(self) -> None:
        known = {
            "colors": COLORS,
            "shapes": SHAPES,
            "motions": MOTIONS,
            "sizes": SIZES,
            "backgrounds": BACKGROUNDS,
            "cameras": CAMERAS,
            "changes": CHANGES,
        }
        for field, names in known.items():
            given = tuple(getattr(self, field))
            unknown = [name for name in given if name not in names]
            if unknown or not given:
                raise ValueError(f"WorldConfig: {field} must be names out of {list(names)}, got {list(given)}")
            object.__setattr__(self, field, given)
        object.__setattr__(self, "objects", tuple(self.objects))
        object.__setattr__(self, "speed", tuple(self.speed))
        if not 1 <= self.objects[0] <= self.objects[1] <= len(self.colors):
            raise ValueError(
                f"WorldConfig: objects must be 1 <= fewest <= most <= {len(self.colors)} colors (each object "
                f"has its own colour), got {self.objects}"
            )
        if not 0 < self.speed[0] <= self.speed[1] <= 0.5 or self.room < 1 or not 0 <= self.texture <= 0.1:
            raise ValueError(
                "WorldConfig: need 0 < slowest <= fastest <= 0.5 in speed, room >= 1 and 0 <= texture <= 0.1, "
                f"got speed={self.speed}, room={self.room}, texture={self.texture}"
            )


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
