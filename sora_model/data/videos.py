"""Videos as FFmpeg reads them, through PyAV: `Video`.

A file's packets are listed first, without decoding: their time stamps say how many frames there are and when each is shown.
Frames are then asked for by time stamp, so that it makes no difference where decoding begins.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.sidedata.sidedata import SideData
from av.video.reformatter import Interpolation
from PIL import Image

from ..limits import check_limit
from .media import Geometry, PixelLimit, check_pixels, on_white, open_container, resized
from .timeline import Timeline

SEEK_FROM = 64  # frames: below this, decoding from the beginning is as quick as seeking
LARGE_FRAMES = 2**24  # pixels of frames that may be decoded at once, a thread each
BT709, BT601 = 1, 6  # AVColorSpace
MARGIN = 64  # pixels: what decoders add to a side at most, for whole blocks
WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
NO_MATRIX = (0, 2, 3)  # RGB, unspecified, reserved: what a YCbCr frame that is not tagged may say
HD = 720  # rows from which a video that is not tagged counts as BT.709
MIRRORS_AND_TURNS = {  # orientation as in EXIF: the signs of a display matrix [[a, b], [c, d]]
    1: [1, 0, 0, 1], 2: [-1, 0, 0, 1], 3: [-1, 0, 0, -1], 4: [1, 0, 0, -1],
    5: [0, 1, 1, 0], 6: [0, 1, -1, 0], 7: [0, -1, -1, 0], 8: [0, -1, 1, 0],
}  # fmt: skip


class Key(NamedTuple):
    """A packet from which decoding can begin."""

    stamp: int
    dts: int
    number: int  # packets before it


class Video:
    """The first video stream of a file that is no attached picture.

    path: the file. limit: the most pixels of a frame.
    """

    def __init__(self, path: Path, limit: PixelLimit) -> None:
        self.path, self.limit = path, limit
        stamps: list[int | None] = []
        keys: list[Key] = []
        first: av.VideoFrame | None = None
        last = (-(2**63), 0)  # time stamp and duration of the packet that is shown last
        with open_container(path) as container:
            stream = _stream(container)
            decoder = _decoder(stream, limit)
            for packet in container.demux(stream):
                if first is None:
                    first = next(iter(decoder.decode(packet if packet.size else None)), None)
                if not packet.size or packet.is_discard:  # the end; or cut out by an edit list
                    continue
                stamps.append(packet.pts)
                check_limit("frames", len(stamps), "its length", "frames", counted=True)
                if packet.pts is not None:
                    last = max(last, (packet.pts, packet.duration or 0))
                    if packet.is_keyframe and packet.dts is not None:
                        keys.append(Key(packet.pts, packet.dts, len(stamps) - 1))
            if first is None or not stamps or stream.time_base is None:
                raise ValueError("it has no frames")
            check_pixels(first.width, first.height, limit)
            stated = stream.average_rate or stream.guessed_rate
            self.stamped = None not in stamps and first.pts is not None
            if self.stamped:
                distinct = sorted({stamp for stamp in stamps if stamp is not None})
                self.timeline = Timeline.of_stamps(distinct, last[1], stream.time_base, stated)
            else:  # as in some AVI files: frames are counted as they come
                rate = stated or Fraction(1)
                self.timeline = Timeline(range(len(stamps)), 1 / rate, rate)
            self.geometry = _geometry(first, stream)
        self.keys = keys if self.stamped else []
        self.frames, self.rate = len(self.timeline.stamps), self.timeline.rate

    def pixels(self, numbers: Sequence[int], size: tuple[int, int]) -> Iterator[np.ndarray]:
        """The frames of these numbers, in rising order, uint8 [H, W, 3] of `size`. Scaled one by one, as they are decoded."""
        height, width = self.geometry.stored(size)
        wanted = [self.timeline.stamps[self.timeline.shown(number)] for number in numbers]
        for frame in self._shown(wanted):
            yield self.geometry.upright(_rgb(frame, height, width))

    def _shown(self, wanted: Sequence[int]) -> Iterator[av.VideoFrame]:
        """The frame shown at each of the time stamps, which rise: the latest that is not later, or the first of all."""
        place, shown = 0, None
        for stamp, frame in self._from(wanted[0]):
            if (frame.height, frame.width) != (self.geometry.height, self.geometry.width):
                was = f"{self.geometry.height}x{self.geometry.width}"
                raise ValueError(f"its size changes from {was} to {frame.height}x{frame.width}")
            while wanted[place] < stamp:
                yield shown or frame
                place += 1
                if place == len(wanted):
                    return
            shown = frame
            if wanted[-1] == stamp:
                break
        if shown is None:
            raise ValueError("it has no frames")
        for _ in wanted[place:]:
            yield shown

    def _from(self, stamp: int) -> Iterator[tuple[int, av.VideoFrame]]:
        """Time stamps and frames from one on that is not later than `stamp`."""
        key = max((key for key in self.keys if key.stamp <= stamp), default=None)
        if key is not None and key.number > SEEK_FROM:
            frames = self._decoded(key)
            first = next(frames, None)
            if first is not None and first[0] <= stamp:
                yield first
                yield from frames
                return
        yield from self._decoded(None)

    def _decoded(self, key: Key | None) -> Iterator[tuple[int, av.VideoFrame]]:
        """Time stamps and frames: all, or those from a key frame on; none where the file's format does not let us go there."""
        with open_container(self.path) as container:
            stream = _stream(container)
            decoder = _decoder(stream, self.limit)
            if key is not None:
                try:
                    container.seek(key.dts, stream=stream)  # containers are searched by decoding time
                except av.FFmpegError:
                    return
            count = 0
            for packet in container.demux(stream):
                for frame in decoder.decode(packet if packet.size else None):
                    stamp = frame.pts if self.stamped else count
                    count += 1
                    check_pixels(frame.width, frame.height, self.limit)
                    if stamp is not None:
                        yield stamp, frame


def _stream(container: av.container.InputContainer) -> av.VideoStream:
    stream = container.streams.best("video")
    if not isinstance(stream, av.VideoStream):
        raise ValueError("it has no video stream")
    return stream


def _decoder(stream: av.VideoStream, limit: PixelLimit) -> av.VideoCodecContext:
    """The stream's decoder; where VP8 and VP9 have transparency, libvpx's, as FFmpeg's own leaves it out."""
    decoder = stream.codec_context
    width, height = decoder.width, decoder.height
    check_pixels(width, height, limit)
    if stream.metadata.get("alpha_mode") == "1" and decoder.name in WITH_ALPHA:
        decoder = av.CodecContext.create(WITH_ALPHA[decoder.name], "r")  # type: ignore[assignment]
    decoder.thread_type = "AUTO"
    decoder.thread_count = max(min(os.cpu_count() or 1, LARGE_FRAMES // max(width * height, 1)), 1)
    # For streams whose frames are larger than their file's header says; one that says 2^24 x 1 must not raise the limit either.
    most = limit.most + min(MARGIN * (width + height + MARGIN), limit.most // 2)
    decoder.options = {"max_pixels": str(most)}
    return decoder


def _geometry(frame: av.VideoFrame, stream: av.VideoStream) -> Geometry:
    aspect = stream.sample_aspect_ratio or Fraction(1)
    if not Fraction(1, 8) <= aspect <= 8:  # no camera has such pixels: a broken tag
        aspect = Fraction(1)
    return Geometry(frame.height, frame.width, _orientation(frame), aspect)


def _orientation(frame: av.VideoFrame) -> int:
    """Of the display matrix, which moves (x, y) to (a x + c y, b x + d y); 1 where that is no turn by whole right angles."""
    side_data = frame.side_data.get("DISPLAYMATRIX")
    if not isinstance(side_data, SideData) or side_data.buffer_size < 36:
        return 1
    a, b, _, c, d = np.frombuffer(bytes(side_data), np.int32)[:5].tolist()
    largest = max(abs(a), abs(b), abs(c), abs(d), 1)
    signs = [0 if abs(value) * 100 < largest else 1 if value > 0 else -1 for value in (a, b, c, d)]
    return next((orientation for orientation, of_it in MIRRORS_AND_TURNS.items() if of_it == signs), 1)


def _rgb(frame: av.VideoFrame, height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3], by the frame's own colour matrix and range; what is transparent on white."""
    if not frame.format.is_rgb and frame.colorspace in NO_MATRIX:
        frame.colorspace = BT709 if frame.height >= HD else BT601
    if frame.format.has_palette or any(component.is_alpha for component in frame.format.components):
        image = on_white(Image.fromarray(frame.to_ndarray(format="rgba")))
        return np.asarray(resized(image, height, width))
    return frame.to_ndarray(format="rgb24", width=width, height=height, interpolation=Interpolation.BICUBIC)
