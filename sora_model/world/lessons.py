"""Clips of the world that teach a task: each comes with its clean frames, and a caption that fits the others. But for
closeups, which nothing but a VAE learns from.

    drift     a scene caught at any time, bouncing off borders; a start or an end is clean, and the caption names no motion:
              a video goes on as it does
    turn      a start is clean, and from its last frame on the object moves as the caption says: a world that obeys
    link      a start and an end of the same object elsewhere; between them it takes the smoothest way: joining, and loops (of a
              clip of two token frames only the start)
    morph     the same of two scenes: on the way one object becomes another, before another background
    closeup   a part of a scene, many times as large, without a caption or clean frames: what a VAE has to know of large frames

Given frames are whole token frames: `first` pixel frames and then `stride` each (see `sizes.Timing`). The world says
into which motions an object may turn and what it may become, so that no caption names a combination kept from training; an object
that bounces may be seen to move that way.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from ..sizes import Size, Timing
from .config import MOTIONS
from .scene import Scene, Thing
from .shapes import Array
from .world import World

REACH = 0.1  # of the free range per frame: how fast a passage may be
NEAREST = 12.0  # times as large: a clip of 48 pixels is then a part of a frame of 576
Lesson = tuple[torch.Tensor, str, str | None, torch.Tensor]  # clip [3, T, H, W], caption, long caption, bool [T]: clean frames


def drift(scene: Scene, size: Size, timing: Timing, world: World, rng: np.random.Generator) -> Lesson:
    """A clip of `size` (T, H, W) from any time of the scene; a start or an end is clean."""
    frames, stride = size[0], timing.stride
    scene = scene.advanced(int(rng.integers(4 * scene.config.room)))
    clean = _start(frames, timing, rng)
    more = _more(frames, timing)
    if rng.integers(2) == 0 and more > 0:
        clean = torch.arange(frames) >= frames - stride * int(rng.integers(1, more + 1))
    return scene.render(*size), scene.caption(frames=frames, motion=False), None, clean


def turn(scene: Scene, size: Size, timing: Timing, world: World, rng: np.random.Generator) -> Lesson:
    """A clip whose object moves another way after the clean start; ways with some room to go are preferred."""
    frames = size[0]
    clean = _start(frames, timing, rng)
    before = scene.advanced(int(rng.integers(2 * scene.config.room)))
    now = before.advanced(int(clean.sum()) - 1)
    u = np.array(now.things[0].u)
    free = [name for name, way in MOTIONS.items() if ((u + 0.4 * np.array(way) > -0.1) & (u + 0.4 * np.array(way) < 1.1)).all()]
    motions = world.motions(now.things[0])
    names = [name for name in free if name in motions] or list(motions)
    after = now.turned(names[int(rng.integers(len(names)))])
    start, height, width = int(clean.sum()), *size[1:]
    parts = [before.render(start, height, width)]
    if frames > start:
        parts.append(after.render(frames - start, height, width, start=1))
    left = frames - start + 1
    return torch.cat(parts, dim=1), after.caption(frames=left), after.caption(True, left), clean


def link(scene: Scene, size: Size, timing: Timing, world: World, rng: np.random.Generator) -> Lesson:
    """A clip that begins as one clip of the object and ends as another; both ends are clean."""
    first, last, leave, arrive = _ends(scene, scene, size[0], timing, rng)
    motions = world.motions(scene.things[0])
    last = last.turned(motions[int(rng.integers(len(motions)))])
    time, caption = torch.arange(size[0]), scene.caption(motion=False)
    linked = _linked(first, first, last, leave, arrive)
    return linked.render(*size), caption, None, (time <= leave) | (time >= arrive)


def morph(scene: Scene, size: Size, timing: Timing, world: World, rng: np.random.Generator) -> Lesson:
    """A clip that begins in one scene and ends in another, which fades in while the first object takes the way to the other.

    A clip of two token frames is too short for both ends: it becomes a `link`.
    """
    if _more(size[0], timing) < 2:
        return link(scene, size, timing, world, rng)
    other = world.sample(int(rng.integers(2**31)))
    first, last, leave, arrive = _ends(scene, other, size[0], timing, rng)
    before, after = (_linked(looks, first, last, leave, arrive) for looks in (first, last.advanced(-arrive)))
    time = torch.arange(size[0])
    s = ((time - leave) / (arrive - leave)).clamp(0, 1)
    video = torch.lerp(before.render(*size), after.render(*size), (s * s * (3 - 2 * s))[:, None, None])
    verb = "becomes" if len(scene.things) == 1 else "become"
    caption = f"{scene.caption(motion=False)} {verb} {other.caption(motion=False)}"
    return video, caption, None, (time <= leave) | (time >= arrive)


def closeup(scene: Scene, size: Size, timing: Timing, world: World, rng: np.random.Generator) -> Lesson:
    """A clip of a part of the scene, at the object or not far from it: an edge that moves fast, or something plain."""
    frames, height, width = size
    zoom = float(np.exp(rng.uniform(0, np.log(NEAREST))))
    scene = scene.advanced(int(rng.integers(2 * scene.config.room)))
    seen = scene.truth(*size).objects[0]
    aside = rng.uniform(-1.5, 1.5, 2) * seen.radius[0] * min(height, width) / np.array([width, height])
    near = Closeup(**vars(scene), zoom=zoom, centre=tuple((seen.path[frames // 2] + aside).tolist()))
    return near.render(*size), "", None, torch.zeros(frames, dtype=torch.bool)


@dataclass(frozen=True)
class Closeup(Scene):
    """A scene seen from near: `zoom` times as large, `centre` of the view in the middle.

    A background's pattern, and the camera's path over it, stay as they are.
    """

    zoom: float = 1.0
    centre: tuple[float, float] = (0.5, 0.5)

    def _track(self, thing: Thing, t: Array, height: int, width: int) -> tuple[Array, Array, Array, tuple[float, float]]:
        path, radius, angle, (x, y) = super()._track(thing, t, height, width)
        return 0.5 + self.zoom * (path - self.centre), self.zoom * radius, angle, (self.zoom * x, self.zoom * y)


def _ends(scene: Scene, other: Scene, frames: int, timing: Timing, rng: np.random.Generator) -> tuple[Scene, Scene, int, int]:
    """The scene at frame 0 and its last clean frame; the other one and its first clean frame, its own frame 0."""
    first_frames, stride = timing
    spare = _more(frames, timing) - 1  # token frames that can be clean, besides the first; one at least is not
    end = stride * int(rng.integers(1, spare + 1)) if spare > 0 else 0
    start = first_frames + stride * int(rng.integers(0, spare - end // stride + 1)) if spare > 0 else first_frames
    first = scene.advanced(int(rng.integers(2 * scene.config.room)))
    here = np.array(first.advanced(start - 1).things[0].u)
    for _ in range(16):  # a few tries to end where it can be in so few frames
        last = other.advanced(int(rng.integers(4 * other.config.room)))
        if np.abs(np.array(last.things[0].u) - here).max() < REACH * (frames - end - start + 1):
            break
    return first, last, start - 1, frames - end


def _linked(looks: Scene, first: Scene, last: Scene, leave: int, arrive: int) -> Scene:
    """A scene whose first object takes the way from first's at frame `leave` to last's at frame `arrive`."""
    a, b, thing = first.things[0], last.things[0], looks.things[0]
    moved = Link(**{**vars(thing), "u": a.u, "v": a.v}, to=b, leave=leave, arrive=arrive)
    return replace(looks, things=(moved, *looks.things[1:]))


@dataclass(frozen=True)
class Link(Thing):
    """An object that moves as itself until frame `leave`, as `to` from frame `arrive` on, and smoothly in between."""

    to: Thing
    leave: int
    arrive: int

    def path(self, t: Array) -> Array:
        begin, end = super().path(np.array([self.leave - 1.0, self.leave])), self.to.path(np.array([0.0, 1.0]))
        span = self.arrive - self.leave
        s = np.clip((t - self.leave) / span, 0, 1)[:, None]
        # The cubic through both places with both velocities (Hermite).
        between = (
            (1 + 2 * s) * (1 - s) ** 2 * begin[1]
            + s * (1 - s) ** 2 * span * (begin[1] - begin[0])
            + s**2 * (3 - 2 * s) * end[0]
            + s**2 * (s - 1) * span * (end[1] - end[0])
        )
        outside = np.where(t[:, None] <= self.leave, super().path(t), self.to.path(t - self.arrive))
        inside = (t > self.leave) & (t < self.arrive)
        return np.where(inside[:, None], np.clip(between, 0, 1), outside)


def _more(frames: int, timing: Timing) -> int:
    """Token frames after the first."""
    first, stride = timing
    return (frames - first) // stride


def _start(frames: int, timing: Timing, rng: np.random.Generator) -> torch.Tensor:
    """bool [T], a clean start that leaves at least one token frame to be learned."""
    first, stride = timing
    return torch.arange(frames) < first + stride * int(rng.integers(max(_more(frames, timing), 1)))
