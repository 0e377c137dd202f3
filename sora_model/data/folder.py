"""A folder of videos and images with a caption beside each, at native sizes: `FolderSource`.

clips/
  surf.mp4      surf.txt           "a dog rides a wave at sunset"
                surf.detailed.txt  a long caption too, if there is one
  cats/nap.png  cats/nap.txt       "a cat asleep on a radiator"

>>> from sora_model.data import write_video
>>> path = write_video("clips/cats/nap.png", torch.zeros(3, 1, 512, 768))
>>> length = path.with_suffix(".txt").write_text("a cat asleep on a radiator")
>>> source = FolderSource("clips", multiple_of=(1, 16, 16), max_frames=48, max_pixels=480 * 848)
>>> source.size(0)  # read from the file's header
(1, 512, 768)
>>> sample = source.load(0)  # decoded now, in [-1, 1]
>>> sample.video.shape, sample.caption
(torch.Size([3, 1, 512, 768]), 'a cat asleep on a radiator')
"""

from __future__ import annotations

import codecs
import logging
import os
from pathlib import Path

import numpy as np

from ..limits import OverLimit, check_text
from ..sizes import Size, Timing
from ..storage.documents import read_bytes_file
from .budget import Fit, Limits
from .media import IMAGE_SUFFIXES, VIDEO_SUFFIXES, MediaError, scaled_size
from .sample import Sample
from .video_io import probe, read_video

logger = logging.getLogger(__name__)
SUFFIXES = (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES)


class FolderSource:
    """Videos and images of a folder and all folders in it, each with its caption in a .txt file of the same name.

    Captions are in UTF-8, or in UTF-16 that begins with a byte order mark. Links to files and folders are followed, each folder
    is gone through once. Files and folders whose names begin with a dot are not looked at.

    Files are opened once here, for their sizes, and decoded when loaded. A file that cannot be used (broken, no caption,
    smaller than `multiple_of`) is left out with one warning line that names it and says why.

    folder: path. max_frames: longer videos give a clip of this many frames, drawn anew in every epoch.
    frame_stride: take every n-th frame. max_pixels: frames of more than this height x width are scaled down, keeping their
    aspect ratio. multiple_of: (T, H, W), what lengths and sizes must divide by (VAE stride x patch size); what is over is
    cut off, evenly around the picture and at the end of the clip, never scaled. first: lengths become first + T n instead, as
    causal VAEs want that code the first frame alone (first=1; an image then fits any T). fit: also cuts and scales what no batch
    can hold; `fitted` has the numbers of these clips. captions: False takes files without captions, which are then empty. seed:
    of the clips drawn.

    Raises ValueError if the folder has no usable file.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        multiple_of: tuple[int, int, int] = (1, 1, 1),
        first: int | None = None,
        max_frames: int | None = None,
        frame_stride: int = 1,
        max_pixels: int | None = None,
        fit: Fit | None = None,
        captions: bool = True,
        seed: int = 0,
    ) -> None:
        for name, value in (("max_frames", max_frames), ("frame_stride", frame_stride), ("max_pixels", max_pixels)):
            if value is not None and value < 1:
                raise ValueError(f"FolderSource: {name} must be at least 1, got {value}")
        if len(multiple_of) != 3 or min(multiple_of) < 1:
            raise ValueError(f"FolderSource: multiple_of must be three numbers of at least 1 (T, H, W), got {multiple_of}")
        self.folder, self.multiple_of, self.first = Path(folder), multiple_of, first
        self.max_frames, self.frame_stride, self.max_pixels, self.seed = max_frames, frame_stride, max_pixels, seed
        self.fitted: list[int] = []
        self.paths: list[Path] = []
        self.captions: list[str] = []
        self.detailed: list[str | None] = []
        self._sizes: list[Size] = []
        self._pixels: list[int | None] = []  # the most that frames are scaled to
        self._lengths: list[int] = []  # frames in the file
        found = _media_files(self.folder)
        for path in found:
            try:
                caption = self._caption(path.with_suffix(".txt"), path) if captions else ""
                long = path.with_suffix(".detailed.txt")
                detailed, native = self._caption(long, path) if captions and os.path.exists(long) else None, probe(path)
                limits, most = self._limits(path, native, fit), self._most(native)
                size = self._planned_size(path, native, limits)
            except MediaError as error:
                logger.warning("left out: %s", error)
                continue
            if limits != most:
                self.fitted.append(len(self.paths))
            self.paths.append(path)
            self.captions.append(caption)
            self.detailed.append(detailed)
            self._sizes.append(size)
            self._pixels.append(limits.pixels)
            self._lengths.append(native[0])
        self._fitted = frozenset(self.fitted)
        if not self.paths:
            what = f"none of its {len(found)} video and image files can be used" if found else "it has none"
            missing = "" if self.folder.is_dir() else " (there is no such folder)"
            captioned = ", each with its caption in a .txt file of the same name" if captions else ""
            raise ValueError(
                f"FolderSource: folder {self.folder}{missing} must hold videos or images ({' '.join(SUFFIXES)}){captioned}; {what}"
            )

    def __len__(self) -> int:
        return len(self.paths)

    def size(self, index: int) -> tuple[int, int, int]:
        """Size (T, H, W) of sample `index` as `load` will return it, without decoding."""
        return self._sizes[index]

    def name(self, index: int) -> str:
        """What messages call sample `index`: its path."""
        return str(self.paths[index])

    def load(self, index: int, epoch: int = 0) -> Sample:
        """Decode sample `index`: video float32 [3, T, H, W] in [-1, 1], and its caption.

        A video that is cut gives the clip drawn for this epoch. A file that has become shorter can give fewer frames
        than `size` said. Raises MediaError if it cannot be decoded or its frames have become smaller.
        """
        path, rng = self.paths[index], np.random.default_rng((self.seed, epoch, index))
        frames, height, width = self._sizes[index]
        span = (frames - 1) * self.frame_stride + 1
        start = int(rng.integers(self._lengths[index] - span + 1)) if self.max_frames or index in self._fitted else 0
        stride, pixels = self.frame_stride, self._pixels[index]
        video, _ = read_video(path, start=start, max_frames=frames, frame_stride=stride, max_pixels=pixels, normalize=True)
        frames, (scaled_h, scaled_w) = self._whole_frames(path, video.shape[1]), video.shape[2:]
        if scaled_h < height or scaled_w < width:
            raise MediaError(f"{path} was {height}x{width} or larger when its folder was read, and is {scaled_h}x{scaled_w} now")
        top, left = (scaled_h - height) // 2, (scaled_w - width) // 2
        clipped = video[:, :frames, top : top + height, left : left + width].contiguous()
        return Sample(clipped, self.captions[index], self.detailed[index])

    def _caption(self, text: Path, path: Path) -> str:
        try:
            data = read_bytes_file(text, "text", each=4)
            marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
            caption = " ".join(data.decode("utf-16" if marked else "utf-8-sig").split())
            check_text(caption, text.name)
        except FileNotFoundError:
            raise MediaError(f"{path} has no caption: {text.name} is not beside it") from None
        except OverLimit as error:
            raise MediaError(f"{path} has no caption: {error}") from None
        except (OSError, ValueError) as error:
            raise MediaError(f"{path} has no caption: {text.name} cannot be read ({error})") from None
        if not caption:
            raise MediaError(f"{path} has no caption: {text.name} is empty")
        return caption

    def _most(self, native: Size) -> Limits:
        """What the folder's own limits leave of a file."""
        frames = -(-native[0] // self.frame_stride)
        return Limits(min(frames, self.max_frames or frames), self.max_pixels)

    def _limits(self, path: Path, native: Size, fit: Fit | None) -> Limits:
        """The same, and what a batch can hold of it."""
        most = self._most(native)
        if fit is None:
            return most

        def planned(limits: Limits) -> Size | None:
            try:
                return self._planned_size(path, native, limits)
            except MediaError:
                return None

        stride = self.multiple_of[0]
        timing = Timing(stride if self.first is None else self.first, stride)
        return fit.limits(planned, most, native[1] * native[2], self.multiple_of, timing)

    def _planned_size(self, path: Path, native: Size, limits: Limits) -> Size:
        _, height, width = native
        frames = self._whole_frames(path, limits.frames)
        _, multiple_h, multiple_w = self.multiple_of
        scaled_h, scaled_w = scaled_size(height, width, limits.pixels)
        if scaled_h < multiple_h or scaled_w < multiple_w:
            raise MediaError(f"{path} is {height}x{width}, scaled {scaled_h}x{scaled_w}: less than {multiple_h}x{multiple_w}")
        return frames, scaled_h - scaled_h % multiple_h, scaled_w - scaled_w % multiple_w

    def _whole_frames(self, path: Path, frames: int) -> int:
        """The most frames, out of `frames`, that the patching can take."""
        multiple = self.multiple_of[0]
        first = multiple if self.first is None else self.first
        if frames < first:
            raise MediaError(f"{path} has {frames} frames, less than {first}")
        return frames - (frames - first) % multiple


def _media_files(folder: Path) -> list[Path]:
    """Sorted paths of the files that have the suffix of a video or image."""
    found: list[Path] = []
    visited: set[tuple[int, int]] = set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=_left_out):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in visited:  # by another link, or by one to a folder that it is in
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = (Path(parent, name) for name in names if not name.startswith("."))
        # A broken link is to be named; a named pipe would be waited for.
        found += [path for path in paths if path.suffix.lower() in SUFFIXES and (path.is_file() or not path.exists())]
    return sorted(found)


def _left_out(error: OSError) -> None:
    """A folder that cannot be listed. That there is none at all is an error."""
    if not isinstance(error, FileNotFoundError):
        logger.warning("left out: %s", error)
