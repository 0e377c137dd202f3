"""Shapes as signed distance functions, drawn anti-aliased: `stamp`, `moments`.

A shape of radius 1 is drawn around the origin, x to the right and y down. A pixel at distance d (in pixels) outside the
outline is covered by clip(1/2 - d, 0, 1), which is exact for a straight edge along an axis through a pixel.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from math import cos, pi, sin
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# Wedge shapes repeat n times around the centre: (n, radius halfway between two tips, angle of the first tip).
_WEDGES = {
    "square": (4, 2**-0.5, pi / 4), "triangle": (3, 0.5, -pi / 2), "star": (5, 0.45, -pi / 2),
}  # fmt: skip
_SIX = ((0.3, -0.66), (0.05, -0.72), (-0.2, -0.6), (-0.4, -0.2), (-0.4, 0.45), (-0.2, 0.72), (0.2, 0.72), (0.4, 0.45),
        (0.4, 0.2), (0.2, -0.05), (-0.2, -0.05), (-0.4, 0.2))  # fmt: skip
# Digits are pen strokes: polylines through these points, in units of the radius.
DIGITS = {
    "0": (((-0.2, -0.72), (0.2, -0.72), (0.4, -0.45), (0.4, 0.45), (0.2, 0.72), (-0.2, 0.72), (-0.4, 0.45),
           (-0.4, -0.45), (-0.2, -0.72)),),
    "1": (((-0.28, -0.42), (0.04, -0.72), (0.04, 0.72)), ((-0.28, 0.72), (0.36, 0.72))),
    "2": (((-0.4, -0.48), (-0.2, -0.72), (0.2, -0.72), (0.4, -0.48), (0.38, -0.2), (-0.4, 0.72), (0.4, 0.72)),),
    "3": (((-0.4, -0.58), (-0.18, -0.72), (0.18, -0.72), (0.38, -0.5), (0.36, -0.2), (0.1, -0.03), (0.4, 0.2),
           (0.4, 0.48), (0.2, 0.72), (-0.2, 0.72), (-0.42, 0.56)), ((-0.12, -0.03), (0.1, -0.03))),
    "4": (((0.2, 0.76), (0.2, -0.74), (-0.42, 0.28), (0.46, 0.28)),),
    "5": (((0.36, -0.72), (-0.34, -0.72), (-0.38, -0.08), (0.14, -0.14), (0.4, 0.1), (0.4, 0.46), (0.2, 0.72),
           (-0.2, 0.72), (-0.42, 0.56)),),
    "6": (_SIX,),
    "7": (((-0.4, -0.72), (0.4, -0.72), (-0.08, 0.76)),),
    "8": (((-0.14, -0.03), (-0.36, -0.25), (-0.36, -0.5), (-0.18, -0.72), (0.18, -0.72), (0.36, -0.5), (0.36, -0.25),
           (0.14, -0.03), (0.4, 0.22), (0.4, 0.5), (0.2, 0.72), (-0.2, 0.72), (-0.4, 0.5), (-0.4, 0.22),
           (-0.14, -0.03), (0.14, -0.03)),),
    "9": (tuple((-x, -y) for x, y in _SIX),),
}  # fmt: skip
_PEN = 0.17  # half the width of a stroke
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "ring", *DIGITS)
# Shapes that can be seen to spin, with the number of turns of a circle that leave them the same.
SPINNING = {"square": 4, "triangle": 3, "diamond": 2, "star": 5, "cross": 4}


def distance(shape: str, x: Array, y: Array) -> Array:
    """Signed distance to the outline of a shape of radius 1, negative inside."""
    if shape in DIGITS:
        ends = np.array([(*a, *b) for line in DIGITS[shape] for a, b in pairwise(line)], np.float32)
        ax, ay, bx, by = ends.T.reshape(4, -1, *[1] * x.ndim)
        dx, dy = bx - ax, by - ay
        along = np.clip(((x - ax) * dx + (y - ay) * dy) / (dx**2 + dy**2), 0, 1)
        return np.sqrt(((x - ax - along * dx) ** 2 + (y - ay - along * dy) ** 2).min(0)) - _PEN
    if shape == "cross":
        x, y = np.abs(x), np.abs(y)
        return np.minimum(np.maximum(x - 0.95, y - 0.31), np.maximum(x - 0.31, y - 0.95))
    if shape == "diamond":
        return (np.abs(x) / np.float32(0.62) + np.abs(y) - 1) / np.float32(np.hypot(1 / 0.62, 1))
    r = np.hypot(x, y)
    if shape == "circle":
        return r - 0.95
    if shape == "ring":
        return np.abs(r - 0.72) - 0.24
    n, inner, first = _WEDGES[shape]
    fold = np.abs((np.arctan2(y, x) - first + pi / n) % (2 * pi / n) - pi / n)
    edge = np.array([inner * cos(pi / n) - 1, inner * sin(pi / n)])  # from a tip to the halfway point
    nx, ny = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
    return (r * np.cos(fold) - 1) * np.float32(nx) + r * np.sin(fold) * np.float32(ny)


def stamp(
    shape: str, path: Array, radius: Array, angle: Array, height: int, width: int
) -> tuple[tuple[Array, Array, Array], Array]:
    """Coverage of the pixels around a moving shape: index arrays into [T, H, W] and alpha [T, h, w] for that window.

    path: [T, 2] centre in fractions of width and height. radius: [T] fraction of the shorter side. angle: [T] radians.
    """
    r = (radius * min(height, width)).astype(np.float32)
    half = int(np.ceil(r.max() * 1.05)) + 1
    h, w = min(2 * half + 1, height), min(2 * half + 1, width)
    center = path * [width, height]
    corner = np.clip(np.floor(center).astype(np.int64) - half, 0, [width - w, height - h])
    cols, rows = corner[:, :1] + np.arange(w), corner[:, 1:] + np.arange(h)
    x = ((cols + 0.5 - center[:, :1]).astype(np.float32) / r[:, None])[:, None, :]
    y = ((rows + 0.5 - center[:, 1:]).astype(np.float32) / r[:, None])[:, :, None]
    if angle.any():
        c, s = (f(angle).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))
        x, y = c * x + s * y, c * y - s * x
    else:
        x, y = np.broadcast_arrays(x, y)
    alpha = np.clip(0.5 - distance(shape, x, y) * r[:, None, None], 0, 1)
    return (np.arange(len(path))[:, None, None], rows[:, :, None], cols[:, None, :]), alpha


@lru_cache
def moments(shape: str) -> tuple[float, Array]:
    """Area and centroid (x, y) of a shape of radius 1."""
    grid = (np.arange(400, dtype=np.float32) + 0.5) / 200 - 1
    x, y = np.broadcast_arrays(grid[None, :] * 1.1, grid[:, None] * 1.1)
    alpha = np.clip(0.5 - distance(shape, x, y) * 182, 0, 1)
    area = alpha.sum() * (1.1 / 200) ** 2
    return float(area), np.array([(alpha * x).sum(), (alpha * y).sum()]) / alpha.sum()
