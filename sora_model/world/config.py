"""What a world may contain: the names of things with their looks, and `WorldConfig`."""

from __future__ import annotations

from dataclasses import dataclass

from .shapes import SHAPES

COLORS = {
    "red": (0.95, 0.15, 0.15), "orange": (1.0, 0.55, 0.1), "yellow": (0.98, 0.9, 0.15), "green": (0.15, 0.8, 0.25),
    "cyan": (0.1, 0.85, 0.9), "blue": (0.2, 0.35, 1.0), "purple": (0.75, 0.25, 0.95), "white": (0.95, 0.95, 0.95),
}  # fmt: skip
BACKGROUNDS = {
    "black": (0.06, 0.06, 0.06), "grey": (0.3, 0.3, 0.3), "navy": (0.07, 0.09, 0.28), "dark green": (0.05, 0.22, 0.12),
    "maroon": (0.26, 0.07, 0.1),
}  # fmt: skip
SIZES = {"small": 0.13, "medium": 0.18, "large": 0.24}  # radius
MOTIONS = {
    "stay": (0, 0), "right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1),
    "up and right": (1, -1), "up and left": (-1, -1), "down and right": (1, 1), "down and left": (-1, 1),
}  # fmt: skip
CAMERAS = {"still": (0, 0), "right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
CHANGES = ("none", "spin", "grow", "shrink")


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
