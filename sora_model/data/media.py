"""What reading any media file shares: which formats, how large a frame may be, which way is up, errors: `Geometry`, `MediaError`.

Only the formats named here are opened, whatever a file is called, and only the file itself: no playlist, no script, no link to
another file. What is transparent is shown on white.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from PIL import Image

from ..limits import hint, limits

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # Pillow's names
VIDEO_FORMATS = "mov,matroska,avi,gif,apng"  # FFmpeg's: mov is MP4 too, matroska is WebM too


class MediaError(ValueError):
    """A file that cannot be read as a video or image; the message names the file and the reason."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever a decoder raises on a bad file into one MediaError that names it.

    Decoders raise errors of any type on bytes that somebody has made up, so all of them are caught.
    """
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # which fails for a name that is too long
            raise MediaError(f"cannot read {path}: expected a file, got a pipe or a device, which might be waited for")
        if path.is_file() and path.stat().st_size == 0:  # files of the kernel are waited for, too, and have no size
            raise MediaError(f"cannot read {path}: it is empty")
        yield
    except MediaError:
        raise
    except Exception as error:
        if isinstance(error, FileNotFoundError):
            reason = "it does not exist"
        elif isinstance(error, (av.FFmpegError, OSError)):
            reason = (error.strerror or str(error)).lower()
        else:
            reason = str(error) or type(error).__name__
        raise MediaError(f"cannot read {path}: {' '.join(reason.split())}") from error


def open_image(path: Path) -> Image.Image:
    """The picture in a file of one of IMAGE_FORMATS, of which only the header is read yet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `check_pixels` has a lower limit
        return Image.open(path, formats=IMAGE_FORMATS)


def open_container(path: Path) -> av.container.InputContainer:
    """The video in a file of one of VIDEO_FORMATS."""
    options = {"format_whitelist": VIDEO_FORMATS, "protocol_whitelist": "file"}
    return av.open(f"file:{path}", options=options)  # without a protocol, "clip:1.mp4" would be one


class PixelLimit(NamedTuple):
    """The most pixels of a frame. name: of `Limits`; None for one that the caller of `read_video` gave."""

    most: int
    name: str | None = None

    @classmethod
    def of(cls, name: str, given: int | None) -> PixelLimit:
        return cls(getattr(limits(), name), name) if given is None else cls(given)


def check_pixels(width: int, height: int, limit: PixelLimit) -> None:
    if width * height > limit.most:
        raised = f"; {hint(limit.name, width * height)}" if limit.name else ""
        raise ValueError(f"its frames of {width}x{height} (width x height) have more than the limit of {limit.most} pixels{raised}")


class Geometry(NamedTuple):
    """How a file's stored frames become upright ones of square pixels.

    >>> Geometry(1080, 1920, orientation=6).size  # a phone held upright
    (1920, 1080)
    >>> Geometry(576, 720, aspect=Fraction(16, 15)).size
    (576, 768)

    orientation: 1 to 8 as in EXIF. aspect: width of a stored pixel over its height.
    """

    height: int
    width: int
    orientation: int = 1
    aspect: Fraction = Fraction(1)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width as shown."""
        return self._turned(self.height, max(round(self.width * self.aspect), 1))

    def stored(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width to which stored frames are scaled, so that they are of this size once upright."""
        return self._turned(*size)

    def upright(self, pixels: np.ndarray) -> np.ndarray:
        """Stored pixels [H, W, 3] -> as shown."""
        if self.orientation >= 5:
            pixels = pixels.swapaxes(0, 1)
        across, down = self.orientation in (2, 3, 6, 7), self.orientation in (3, 4, 7, 8)
        return pixels[:: -1 if down else 1, :: -1 if across else 1]

    def _turned(self, height: int, width: int) -> tuple[int, int]:
        return (width, height) if self.orientation >= 5 else (height, width)


def scaled_size(height: int, width: int, max_pixels: int | None) -> tuple[int, int]:
    """The size within max_pixels that is nearest, of about the same shape; sizes within it stay as they are."""
    if max_pixels is None or height * width <= max_pixels:
        return height, width
    scale = (max_pixels / (height * width)) ** 0.5
    # Of a strip one side is 1, and the other then all that is left.
    return min(max(int(height * scale), 1), max_pixels), min(max(int(width * scale), 1), max_pixels)


def on_white(image: Image.Image) -> Image.Image:
    """An image with transparency -> RGB, as it looks on white."""
    image = image.convert("RGBA")
    sheet = Image.new("RGB", image.size, (255, 255, 255))
    sheet.paste(image, mask=image.getchannel("A"))
    return sheet


def resized(image: Image.Image, height: int, width: int) -> Image.Image:
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)
