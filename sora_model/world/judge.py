"""Does a clip of the world of shapes show what its caption says? Told by a program, from the pixels."""

from __future__ import annotations

from math import cos, pi, sin
from typing import Any

import numpy as np
import torch

from .config import BACKGROUNDS, COLORS, MOTIONS
from .scene import ObjectTruth, Truth
from .shapes import SPINNING, Array, moments, stamp


def judge(video: torch.Tensor | Array, truth: Truth) -> dict[str, Any]:
    """Say from the pixels alone whether a clip shows what its caption asked for.

    Colour: enough pixels, but not too many, lie nearest that colour, and not more lie nearest one that should not be there.
    Motion: the velocity of the centroid of these pixels, freed of the camera's, points in the caption's direction. Shape: their
    mask overlaps best with that of the caption's shape, among all shapes of the world, at equal area and centroid. Only colour,
    shape and motion are asked for, not the exact path, so a generated clip is judged by the truth of any scene with its caption.

    >>> verdict = judge(scene.render(8, 32, 48), scene.truth(8, 32, 48))
    >>> verdict["correct"], verdict["color"], verdict["motion"], verdict["shape"], verdict["background"]
    (True, True, True, True, 'black')

    What a caption leaves open is reported beside it: the background seen, and each object's size as a share of the truth's.

    video: [3, T, H, W] in [-1, 1]. Objects that the truth shows whole in fewer than 3 frames before
    any bounce are left out; motion is None for one frame. Each entry of "objects" has the same keys, and "name",
    "saw_motion", "saw_shape", "scale": whom it is about and what was found.
    """
    pixels = np.asarray(video.detach().float().cpu() if isinstance(video, torch.Tensor) else video, np.float32)
    if pixels.ndim != 4 or pixels.shape[0] != 3:
        raise ValueError(f"judge: video must be [3, T, H, W], got {list(pixels.shape)}")
    if len(truth.pan) != pixels.shape[1]:
        raise ValueError(f"judge: truth is of {len(truth.pan)} frames, but video has {pixels.shape[1]}")
    rgb = (pixels + 1) / 2
    background = np.median(rgb.reshape(3, -1), axis=1)
    masks = _color_masks(rgb, background)
    enough = min(3, pixels.shape[1])
    seen = [o for o in truth.objects if (o.visible[: truth.config.room] > 0.9).sum() >= enough] or truth.objects
    wanted = {o.color for o in truth.objects}
    strangers = max((masks[i].mean() for i, name in enumerate(COLORS) if name not in wanted), default=0.0)
    found = [_judge_object(_solid(masks[list(COLORS).index(o.color)]), o, truth, float(strangers)) for o in seen]
    verdict: dict[str, Any] = {key: all(f[key] for f in found) for key in ("color", "motion", "shape")}
    if pixels.shape[1] == 1:
        verdict["motion"] = None
    nearest = min(BACKGROUNDS, key=lambda name: np.square(background - BACKGROUNDS[name]).sum())
    return {"correct": all(v is not False for v in verdict.values()), **verdict, "background": nearest, "objects": found}


def _judge_object(mask: Array, target: ObjectTruth, truth: Truth, strangers: float) -> dict[str, Any]:
    (frames, height, width), name = mask.shape, f"{target.color} {target.shape}"
    short, mass = min(height, width), mask.sum((1, 2))
    expected = (moments(target.shape)[0] * (target.radius * short) ** 2 * target.visible).mean()
    color = bool(0.35 * expected < mass.mean() < 3 * expected and mask.mean() > strangers)
    if not color:
        motion = None if frames == 1 else False
        return {"name": name, "color": False, "motion": motion, "shape": False, "saw_motion": None, "saw_shape": None, "scale": 0.0}
    y = (mask.sum(2) @ (np.arange(height) + 0.5)) / np.maximum(mass, 1e-6)
    x = (mask.sum(1) @ (np.arange(width) + 0.5)) / np.maximum(mass, 1e-6)
    path = np.stack([x / width, y / height], 1)
    whole = mass / target.radius**2  # largest where nothing hides or cuts the object
    best = np.argsort(-whole, kind="stable")[:3]
    saw_shape = _best_shape(mask[best], path[best], target.change == "spin", truth.config.shapes)
    saw_motion = _motion(path, whole, target, truth) if frames > 1 else None
    return {
        "name": name,
        "color": True,
        "motion": None if frames == 1 else saw_motion == target.motion,
        "shape": saw_shape == target.shape,
        "saw_motion": saw_motion,
        "saw_shape": saw_shape,
        "scale": float(np.sqrt(mass.mean() / expected)),
    }


def _motion(path: Array, whole: Array, target: ObjectTruth, truth: Truth) -> str | None:
    """Name of the motion of a centroid path [T, 2] before any bounce, from the frames where the object is most whole."""
    whole = whole[: truth.config.room]
    used = np.flatnonzero(whole > 0.9 * whole.max())
    if len(used) < max(2, len(whole) // 3):
        used = np.flatnonzero(whole > 0.6 * whole.max())
    if len(used) < 2:
        return None
    v = np.polyfit(used, (path + truth.pan)[used] / target.reach, 1)[0]
    speed = np.hypot(*v)
    if speed < truth.config.speed[0] / 2:
        return "stay"
    return max(MOTIONS, key=lambda m: v @ np.array(MOTIONS[m]) / max(np.hypot(*MOTIONS[m]), 1))


def _color_masks(rgb: Array, background: Array) -> Array:
    """Coverage of each pixel by each colour [colors, T, H, W]: pixel = background + a (colour - background)."""
    lines = np.array(list(COLORS.values()), np.float32) - background.astype(np.float32)
    flat = rgb.reshape(3, -1) - background[:, None].astype(np.float32)
    alpha = np.clip((lines @ flat) / (lines**2).sum(1)[:, None], 0, 1)
    off = (flat**2).sum(0) - 2 * alpha * (lines @ flat) + alpha**2 * (lines**2).sum(1)[:, None]
    alpha *= (off == off.min(0)) & (off < 0.12) & (alpha > 0.15)
    return alpha.reshape(-1, *rgb.shape[1:])


def _solid(mask: Array) -> Array:
    """Drop faint pixels with no clear one beside them: a seam between two other colours can look like a third."""
    clear = np.pad(mask, ((0, 0), (1, 1), (1, 1)))
    clear = np.maximum(np.maximum(clear[:, :-2], clear[:, 1:-1]), clear[:, 2:])
    clear = np.maximum(np.maximum(clear[:, :, :-2], clear[:, :, 1:-1]), clear[:, :, 2:])
    return mask * (clear > 0.7)


def _best_shape(mask: Array, path: Array, spins: bool, shapes: tuple[str, ...]) -> str:
    """Name out of `shapes` whose drawing, at equal area and centroid, overlaps a mask [T, H, W] best (soft IoU).

    path: [T, 2] (x, y) centroid of the mask in fractions of width and height. spins: try turned drawings too.
    """

    def sharpen(alpha: Array) -> Array:  # outlines are compared where coverage is one half: blur hardly moves that line
        return np.clip(1.5 * (alpha - 0.5) + 0.5, 0, 1)

    frames, height, width = mask.shape
    mask, scores = sharpen(mask), {}
    for shape in shapes:
        area, center = moments(shape)
        radius = np.sqrt(np.maximum(mask.sum((1, 2)), 1e-2) / area)  # in pixels; not 0 where a frame has nothing
        turns = np.arange(8) / 8 * 2 * pi / SPINNING[shape] if spins and shape in SPINNING else [0.0]
        overlaps = []
        for turn in turns:
            rotated = center @ np.array([[cos(turn), sin(turn)], [-sin(turn), cos(turn)]])
            origin = path - radius[:, None] * rotated / [width, height]
            place, alpha = stamp(shape, origin, radius / min(height, width), np.full(frames, turn), height, width)
            drawn = np.zeros_like(mask)
            drawn[place] = sharpen(alpha)
            overlaps.append(np.minimum(mask, drawn).sum((1, 2)) / np.maximum(mask, drawn).sum((1, 2)))
        scores[shape] = np.max(overlaps, axis=0).mean()
    return max(scores, key=lambda s: scores[s])
