"""Pictures, and WebP files that move: `Still`, `MovingWebP`.

Both are read as videos are: so many frames, their `Geometry`, and the pixels of those that are asked for.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from ..limits import check_limit
from .media import Geometry, PixelLimit, check_pixels, on_white, open_image, resized
from .timeline import Timeline

ORIENTATION = 0x0112  # EXIF's number of it


class Still:
    """A picture: a video of one frame, without a rate."""

    frames, rate = 1, Fraction(0)

    def __init__(self, path: Path, limit: PixelLimit) -> None:
        self.path, self.limit = path, limit
        with open_image(path) as image:
            if not _scales(image):
                check_pixels(*image.size, limit)
            self.geometry = _geometry(image)

    def pixels(self, numbers: Sequence[int], size: tuple[int, int]) -> Iterator[np.ndarray]:
        """The picture, uint8 [H, W, 3] of `size`, for each of the numbers."""
        height, width = self.geometry.stored(size)
        for _ in numbers:
            with open_image(self.path) as image:
                if _scales(image):
                    image.draft(image.mode, (width, height))  # at least this size, by whole factors, while it is decoded
                check_pixels(*image.size, self.limit)
                yield self.geometry.upright(np.asarray(resized(_rgb(image), height, width)))


class MovingWebP:
    """A WebP file of several frames, which FFmpeg does not read."""

    def __init__(self, path: Path, limit: PixelLimit) -> None:
        self.path = path
        with open_image(path) as image:
            check_pixels(*image.size, limit)
            self.geometry, self.frames = _geometry(image), image.n_frames  # type: ignore[attr-defined]
        check_limit("frames", self.frames, "its length", "frames")
        durations = _webp_durations(path, self.frames + 1)
        if len(durations) != self.frames:
            raise ValueError(f"it says that it has {self.frames} frames, and holds {len(durations)}")
        self.timeline = Timeline.of_durations(durations, Fraction(1, 1000))
        self.rate = self.timeline.rate

    def pixels(self, numbers: Sequence[int], size: tuple[int, int]) -> Iterator[np.ndarray]:
        """The frames of these numbers, in rising order, uint8 [H, W, 3] of `size`."""
        height, width = self.geometry.stored(size)
        with open_image(self.path) as image:
            for number in numbers:
                image.seek(self.timeline.shown(number))
                yield self.geometry.upright(np.asarray(resized(_rgb(image), height, width)))


def is_moving(image: Image.Image) -> bool:
    """A WebP or PNG of several frames. A JPEG may hold several pictures, of which the first is meant."""
    return image.format in ("WEBP", "PNG") and getattr(image, "n_frames", 1) > 1


def _scales(image: Image.Image) -> bool:
    """Whether it can be decoded at a fraction of its size. A progressive JPEG needs all its coefficients in memory."""
    return image.format in ("JPEG", "MPO") and "progressive" not in image.info


def _geometry(image: Image.Image) -> Geometry:
    orientation = image.getexif().get(ORIENTATION, 1)
    valid = isinstance(orientation, int) and 1 <= orientation <= 8
    return Geometry(image.height, image.width, orientation if valid else 1)


def _rgb(image: Image.Image) -> Image.Image:
    """8 bits a channel, what is transparent on white."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _of_16_bits(image)
    if image.has_transparency_data:
        return on_white(image)
    return image.convert("RGB")


def _of_16_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, which Pillow would cut off at 255."""
    values = np.asarray(image).astype(np.uint32).clip(0, 65535)
    grey = ((values + 128) // 257).astype(np.uint8)  # round(value * 255 / 65535)
    if (hidden := image.info.get("transparency")) is not None:
        grey[values == hidden] = 255
    return Image.fromarray(grey).convert("RGB")


def _webp_durations(path: Path, most: int) -> list[int]:
    """Milliseconds of each of the first `most` frames, from the headers of its chunks. Pillow would decode all frames for them."""
    durations: list[int] = []
    with path.open("rb") as file:
        file.seek(12)  # "RIFF", size, "WEBP"
        while len(durations) < most and len(header := file.read(8)) == 8:
            kind, size = struct.unpack("<4sI", header)
            after = file.tell() + size + size % 2
            if kind == b"ANMF":
                durations.append(int.from_bytes(file.read(15)[12:], "little"))
            file.seek(after)
    return durations
