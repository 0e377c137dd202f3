"""Read videos and images: `read_video`, `probe`; see `writing.py` for `write_video` and `contact_sheet`.

In memory a video is a tensor [3, T, H, W], an image one with T = 1: uint8 in 0..255 or float32 in [-1, 1].

>>> path = write_video("cat.mp4", video, fps=29.97)
>>> frames, fps = read_video("cat.mp4", max_frames=8)
>>> frames.shape, frames.dtype, round(fps, 2)
(torch.Size([3, 8, 48, 48]), torch.uint8, 29.97)

Files are read as they are meant to be seen. Rotations and mirrorings of phones and EXIF are followed; one that is no turn by
whole right angles counts as upright. Pixels that are not square become so, at the height that is stored. What is transparent
is shown on white. Colours follow the file's tags; YCbCr without a tag is BT.709 from 720 rows on, and BT.601 below. 16 bits
a channel become 8.

Frames are taken at an even rate, the file's number of frames over its length: frame n is the one that is shown near the start
of the n-th of as many equal intervals. With an even rate that is simply the n-th; where the rate varies, frames are repeated and
left out so that motion keeps its speed (`timeline.py`).
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from .images import MovingWebP, Still, is_moving
from .media import IMAGE_SUFFIXES, VIDEO_SUFFIXES, MediaError, PixelLimit, open_image, reading, scaled_size
from .videos import Video
from .writing import contact_sheet, write_video

__all__ = ["IMAGE_SUFFIXES", "VIDEO_SUFFIXES", "MediaError", "contact_sheet", "probe", "read_video", "write_video"]


def probe(path: str | os.PathLike[str], *, pixel_limit: int | None = None) -> tuple[int, int, int]:
    """Size (T, H, W) of a video or image file as `read_video` gives it, decoding no more than its first frame.

    >>> probe(write_video("cat.mp4", torch.zeros(3, 30, 72, 128)))
    (30, 72, 128)

    pixel_limit: see `read_video`. Raises MediaError if the file is missing, broken, too large or of an unknown kind.
    """
    path = Path(path)
    with reading(path):
        media = _opened(path, pixel_limit)
        return (media.frames, *media.geometry.size)


def read_video(
    path: str | os.PathLike[str],
    *,
    start: int = 0,
    max_frames: int | None = None,
    frame_stride: int = 1,
    max_pixels: int | None = None,
    random_clip: np.random.Generator | None = None,
    normalize: bool = False,
    pixel_limit: int | None = None,
) -> tuple[torch.Tensor, float]:
    """Frames start, start + frame_stride, ... of a video or image file, and the frames per second between them.

    >>> path = write_video("cat.mp4", torch.zeros(3, 30, 72, 128), fps=30)
    >>> frames, fps = read_video(path, max_frames=10, frame_stride=2, normalize=True)
    >>> frames.shape, frames.dtype, fps
    (torch.Size([3, 10, 72, 128]), torch.float32, 15.0)
    >>> read_video(path, max_pixels=32 * 18)[0].shape
    torch.Size([3, 30, 18, 32])

    start: first frame, counted from 0; where it lies far in, decoding begins at a key frame before it.
    max_frames: the most frames returned (None: all). max_pixels: larger frames, as shown, are scaled down to at most so many,
    keeping their shape, one by one as they are decoded, so that no more than one is held at full size. A JPEG of many times as
    many pixels is decoded at a fraction of its size. random_clip: a generator that draws the start among those that leave
    `max_frames` frames (then `start` is not used). normalize: float32 in [-1, 1] instead of uint8. pixel_limit: the most pixels
    of a frame that are decoded; None: those of `sora_model.limits`. Fewer frames come back when the file ends early.
    Raises MediaError if nothing can be read or a frame is over the limit, ValueError for arguments out of range.
    """
    if start < 0 or frame_stride < 1 or (max_frames is not None and max_frames < 1):
        raise ValueError(
            "read_video: need start >= 0, frame_stride >= 1 and max_frames >= 1, "
            f"got start={start}, frame_stride={frame_stride}, max_frames={max_frames}"
        )
    if max_pixels is not None and max_pixels < 1:
        raise ValueError(f"read_video: max_pixels must be at least 1, got {max_pixels}")
    path = Path(path)
    with reading(path):
        media = _opened(path, pixel_limit)
        if random_clip is not None and max_frames is not None:
            start = int(random_clip.integers(max(media.frames - (max_frames - 1) * frame_stride, 1)))
        numbers = range(start, media.frames, frame_stride)[:max_frames]
        if not numbers:
            raise ValueError(f"it has no frame {start}")
        height, width = scaled_size(*media.geometry.size, max_pixels)
        video = torch.empty(3, len(numbers), height, width, dtype=torch.uint8)
        for place, pixels in enumerate(media.pixels(numbers, (height, width))):
            video[:, place] = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
    fps = float(media.rate / frame_stride)
    return (video.float().div_(127.5).sub_(1) if normalize else video), fps


def _opened(path: Path, pixel_limit: int | None) -> Still | MovingWebP | Video:
    """A file by what it holds: a picture under the suffix of one may move."""
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        return Video(path, PixelLimit.of("video_pixels", pixel_limit))
    with open_image(path) as image:
        kind, moves = image.format, is_moving(image)
    if not moves:
        return Still(path, PixelLimit.of("picture_pixels", pixel_limit))
    return (MovingWebP if kind == "WEBP" else Video)(path, PixelLimit.of("video_pixels", pixel_limit))
