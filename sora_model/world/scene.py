"""Scenes of the procedural world: what is in them, how it moves, how it is drawn and described, and the ground truth of it.

A scene is continuous: shapes are signed distance functions, evaluated at pixel centres and anti-aliased over one pixel, so
the same scene can be rendered as an 8x32x32 clip, a 24x96x160 clip or one still image.

    x, y      fractions of the width and height, x to the right and y down; (0.5, 0.5) is the centre of the view
    radius    fraction of the shorter side, so that shapes stay round at every aspect ratio
    frame     the unit of time: a longer clip shows more of the scene, not the same motion more slowly

An object moves back and forth between the borders: its position along each axis is `margin + (1 - 2 margin) tri(u + v t)`,
where `tri` is the triangle wave of period 2 and `margin` keeps the whole shape in view. Captions speak of `u` and `v`
only, and hold at every aspect ratio.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from math import pi

import numpy as np
import torch

from .config import BACKGROUNDS, CAMERAS, COLORS, MOTIONS, WorldConfig
from .shapes import DIGITS, Array, moments, stamp

PAN_SPEED = 0.015  # of the shorter side, per frame
SPIN_SPEED = 0.22  # radians per frame


@dataclass(frozen=True)
class Thing:
    """One object of a scene: u and v are position and velocity in its free range (see the top of this file)."""

    color: str
    shape: str
    motion: str
    size: str
    change: str
    radius: float
    u: tuple[float, float]
    v: tuple[float, float]
    pace: float  # length of v when it moves

    @property
    def name(self) -> str:
        return f"{self.color} digit {self.shape}" if self.shape in DIGITS else f"{self.color} {self.shape}"

    def path(self, t: Array) -> Array:
        """u at times t: [T] -> [T, 2]."""
        return _tri(np.array(self.u) + np.outer(t, self.v))

    def advanced(self, frames: float) -> Thing:
        """The same object with its clock set on by so many frames; after a bounce its motion has another name."""
        z = (np.array(self.u) + frames * np.array(self.v)) % 2
        back = z > 1  # on its way back from the far border
        u, v = np.where(back, 2 - z, z), np.where(back, -1, 1) * self.v
        return replace(self, u=tuple(u.tolist()), v=tuple(v.tolist()), motion=_motion_name(v))

    def turned(self, motion: str) -> Thing:
        """The same object where it is, from now on moving another way, as fast as a mover of its kind (see `World.sample`)."""
        direction = np.array(MOTIONS[motion]) / max(np.hypot(*MOTIONS[motion]), 1)
        return replace(self, v=tuple((self.pace * direction).tolist()), motion=motion)


@dataclass(frozen=True)
class ObjectTruth:
    """What one object does in a rendered clip of T frames.

    path: [T, 2] (x, y) of its centre on the screen. radius, angle: [T] fraction of the shorter side, radians.
    visible: [T] share of its area that is in view and not hidden by objects in front.
    reach: free range along x and y as fractions of the view; a velocity v moves it v * reach per frame.
    """

    color: str
    shape: str
    motion: str
    change: str
    path: Array
    radius: Array
    angle: Array
    visible: Array
    reach: tuple[float, float]


@dataclass(frozen=True)
class Truth:
    """Ground truth of a rendered clip: objects from back to front, background, camera and its path `pan` [T, 2]."""

    objects: tuple[ObjectTruth, ...]
    background: str
    camera: str
    pan: Array
    config: WorldConfig


@dataclass(frozen=True)
class Scene:
    """A continuous scene; `things` from back to front. Made by `World.sample`."""

    things: tuple[Thing, ...]
    background: str
    camera: str
    phase: tuple[float, ...]
    config: WorldConfig
    clock: float = 0.0

    def advanced(self, frames: float) -> Scene:
        """The scene as it goes on from frame `frames`: frame 0 of what comes back, and captions tell of that moment.

        >>> torch.allclose(scene.render(8, 32, 32, start=5), scene.advanced(5).render(8, 32, 32), atol=1e-5)
        True
        """
        return replace(self, things=tuple(thing.advanced(frames) for thing in self.things), clock=self.clock + frames)

    def turned(self, motion: str) -> Scene:
        """The same scene whose first object moves another way from now on."""
        if motion not in MOTIONS:
            raise ValueError(f"Scene.turned: motion must be out of {list(MOTIONS)}, got {motion!r}")
        return replace(self, things=(self.things[0].turned(motion), *self.things[1:]))

    def render(self, frames: int, height: int, width: int, *, start: float = 0.0) -> torch.Tensor:
        """Draw frames `start`, `start + 1`, ... of the scene.

        >>> scene.render(8, 32, 48, start=8).shape                     # the continuation of scene.render(8, 32, 48)
        torch.Size([3, 8, 32, 48])

        frames, height, width: size of the clip, each at least 1; raises ValueError otherwise.
        """
        t = _times(frames, height, width, start)
        video = np.empty((3, frames, height, width), np.float32)
        video[:] = 2 * np.asarray(BACKGROUNDS[self.background], np.float32)[:, None, None, None] - 1
        if self.config.texture:
            video += 2 * self.config.texture * self._texture(t if self.camera != "still" else t[:1], height, width)
        for thing in self.things:
            path, radius, angle, _ = self._track(thing, t, height, width)
            place, alpha = stamp(thing.shape, path, radius, angle, height, width)
            window = (slice(None), *place)
            color = 2 * np.asarray(COLORS[thing.color], np.float32)[:, None, None, None] - 1
            video[window] += alpha * (color - video[window])
        return torch.from_numpy(np.clip(video, -1, 1, out=video))

    def caption(self, detailed: bool = False, frames: int | None = None, *, motion: bool = True) -> str:
        """Say what is seen: short ("a red circle moves right"), or detailed with sizes, places, relations and camera.

        frames: length of the clip. With 1 the caption speaks of a picture and names no motion; with more the detailed
        caption tells of the borders that objects bounce off. None means a clip in which nothing bounces.
        motion: False leaves out of a short caption how things move ("a red circle"), so that a video may go on as it does.
        """
        still = frames == 1
        if not detailed:
            parts = [_article(thing.name) + ("" if still or not motion else " " + _verb(thing)) for thing in self.things]
            return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
        sentences = []
        for thing in self.things:
            who = _article(f"{thing.size} {thing.name}")
            if still:
                sentences.append(f"{who} is {_place(thing.u)}")
                continue
            change = {"none": "", "spin": " while spinning", "grow": " while growing", "shrink": " while shrinking"}
            bounce = _bounces(thing, frames or 1)
            sentences.append(
                f"{who} starts {_place(thing.u)} and {_verb(thing)}{change[thing.change]}"
                + (f", then bounces off the {bounce}" if bounce else "")
            )
        for back, front in pairwise(self.things):
            (dx, dy), verb = np.subtract(front.u, back.u), "is" if still else "starts"
            side = ("to the right of" if dx > 0 else "to the left of") if abs(dx) >= abs(dy) else ("below" if dy > 0 else "above")
            sentences.append(f"the {front.name} {verb} {side} the {back.name} and is in front of it")
        pattern = "patterned " if self.config.texture else ""
        sentences.append(f"the background is {pattern}{self.background}")
        if not still:
            sentences.append("the camera stays still" if self.camera == "still" else f"the camera pans {self.camera}")
        return " ".join(s[0].upper() + s[1:] + "." for s in sentences)

    def truth(self, frames: int, height: int, width: int, *, start: float = 0.0) -> Truth:
        """Ground truth of `render(frames, height, width, start=start)`; paths hold at that aspect ratio."""
        t = _times(frames, height, width, start)
        clear = np.ones((frames, height, width), np.float32)
        objects = []
        for thing in reversed(self.things):  # from front to back: what is left clear for those behind
            path, radius, angle, reach = self._track(thing, t, height, width)
            place, alpha = stamp(thing.shape, path, radius, angle, height, width)
            whole = moments(thing.shape)[0] * (radius * min(height, width)) ** 2
            visible = np.minimum((alpha * clear[place]).sum((1, 2)) / whole, 1)
            clear[place] *= 1 - alpha
            objects.append(ObjectTruth(thing.color, thing.shape, thing.motion, thing.change, path, radius, angle, visible, reach))
        short = min(height, width)
        pan = self._pan(t) * np.array([short / width, short / height])
        return Truth(tuple(reversed(objects)), self.background, self.camera, pan, self.config)

    def _pan(self, t: Array) -> Array:
        """Shift of the view [T, 2] in shorter sides: to one side for `room` frames, then back."""
        extent = PAN_SPEED * self.config.room
        return np.outer(extent * (_tri((t + self.clock) / self.config.room) - 0.5), CAMERAS[self.camera])

    def _track(self, thing: Thing, t: Array, height: int, width: int) -> tuple[Array, Array, Array, tuple[float, float]]:
        short, size = min(height, width), np.array([width, height])
        reach = 1 - 2 * np.minimum(thing.radius * short / size, 0.5)
        path = 0.5 + reach * (thing.path(t) - 0.5) - self._pan(t) * short / size
        t = t + self.clock
        swell = _tri(t / self.config.room + (thing.change == "shrink"))
        radius = thing.radius * (0.6 + 0.4 * swell if thing.change in ("grow", "shrink") else np.ones_like(t))
        angle = SPIN_SPEED * t if thing.change == "spin" else np.zeros_like(t)
        return path, radius, angle, (float(reach[0]), float(reach[1]))

    def _texture(self, t: Array, height: int, width: int) -> Array:
        """Sum of two products of slow waves [T, H, W] in [-1, 1], fixed to the world and so moved by the camera."""
        short, pan, phase = min(height, width), self._pan(t), np.reshape(self.phase, (2, 2, 1, 1))
        x = pan[:, :1] + (np.arange(width) + 0.5) / short
        y = pan[:, 1:] + (np.arange(height) + 0.5) / short
        cycles = np.array([[1.3, 2.9], [3.1, 1.7]])[..., None, None]  # per shorter side, along x and y
        wave_x, wave_y = (
            np.sin(2 * pi * (cycles[:, 0] * x + phase[:, 0])),
            np.sin(2 * pi * (cycles[:, 1] * y + phase[:, 1])),
        )
        return np.einsum("kth,ktw->thw", wave_y, wave_x).astype(np.float32) / 2


def _tri(z: Array) -> Array:
    return 1 - np.abs(z % 2 - 1)


def _motion_name(v: Array) -> str:
    signs = tuple(np.sign(v).astype(int).tolist())
    return next(name for name, direction in MOTIONS.items() if direction == signs)


def _times(frames: int, height: int, width: int, start: float) -> Array:
    if min(frames, height, width) < 1:
        raise ValueError(f"Scene: frames, height and width must be at least 1, got {frames}, {height}, {width}")
    return start + np.arange(frames, dtype=np.float64)


def _article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _verb(thing: Thing) -> str:
    return "stays still" if thing.motion == "stay" else f"moves {thing.motion}"


def _place(u: tuple[float, float]) -> str:
    across = ("left", "", "right")[min(int(u[0] * 3), 2)]
    down = ("top", "", "bottom")[min(int(u[1] * 3), 2)]
    return f"at the {down} {across}".strip() if down else (f"on the {across}" if across else "in the centre")


def _bounces(thing: Thing, frames: int) -> str:
    sides = (("left", "right"), ("top", "bottom"))
    hit = []
    for u, v, (low, high) in zip(thing.u, thing.v, sides, strict=True):
        end = u + v * (frames - 1)
        hit += [high] if end > 1 else [low] if end < 0 else []
    return " and ".join(hit) + (" edges" if len(hit) > 1 else " edge") if hit else ""
