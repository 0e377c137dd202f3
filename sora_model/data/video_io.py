"""Read and write videos and images: `read_video`, `probe`, `write_video`, `contact_sheet`.

In memory a video is a tensor [3, T, H, W], an image one with T = 1: uint8 in 0..255 or float32 in [-1, 1]. Files are read at
their native size, upright (rotation tags of phones and EXIF are followed), and written whole or not at all: to a temporary
file beside the target, which then takes its name.

    video, fps = read_video("cat.mp4", max_frames=16)      # uint8 [3, 16, 720, 1280], 29.97
    write_video("cat.gif", video, fps=8)
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from sora_model.checkpoint import whole_file

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")
SEEK_FROM = 64  # frames: below this, decoding from the beginning is as quick as seeking


class MediaError(ValueError):
    """A file that cannot be read as a video or image; the message names the file and the reason."""


def probe(path: str | os.PathLike[str]) -> tuple[int, int, int]:
    """Size (T, H, W) of a video or image file, decoding no more than its first frame.

        probe("cat.mp4")     # (300, 720, 1280)

    Raises MediaError if the file is missing, broken or of an unknown kind.
    """
    path = Path(path)
    with _reading(path):
        if _is_image(path):
            with Image.open(path) as image:
                turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientations 5 to 8 swap height and width
                return (1, image.width, image.height) if turned else (1, image.height, image.width)
        with av.open(str(path)) as container:
            stream = _video_stream(container)
            first = next(container.decode(stream), None)
            if first is None:
                raise ValueError("it has no frames")
            frames = stream.frames
        if not frames:  # containers that keep no count: count packets, which needs no decoding
            with av.open(str(path)) as container:
                frames = sum(packet.size > 0 for packet in container.demux(_video_stream(container)))
        turned = first.rotation % 180 == 90
        return (frames, first.width, first.height) if turned else (frames, first.height, first.width)


def read_video(
    path: str | os.PathLike[str],
    *,
    start: int = 0,
    max_frames: int | None = None,
    frame_stride: int = 1,
    random_clip: np.random.Generator | None = None,
    normalize: bool = False,
) -> tuple[torch.Tensor, float]:
    """Frames start, start + frame_stride, ... of a video or image file, and the frames per second between them.

        read_video("cat.mp4")                                                    # uint8 [3, 300, 720, 1280], 30.0
        read_video("cat.mp4", max_frames=16, frame_stride=2, normalize=True)     # float32 [3, 16, 720, 1280], 15.0
        read_video("cat.png")                                                    # uint8 [3, 1, 512, 512], 0.0

    start: first frame, counted from 0 (by time where it lies far in, to seek there instead of decoding all before it).
    max_frames: the most frames returned (None: all). random_clip: a generator that draws the start among those that leave
    `max_frames` frames (then `start` is not used). normalize: float32 in [-1, 1] instead of uint8. Fewer frames come back
    when the file ends early. Raises MediaError if nothing can be read, ValueError for arguments out of range.
    """
    if start < 0 or frame_stride < 1 or (max_frames is not None and max_frames < 1):
        raise ValueError(
            "read_video: need start >= 0, frame_stride >= 1 and max_frames >= 1, "
            f"got start={start}, frame_stride={frame_stride}, max_frames={max_frames}"
        )
    path = Path(path)
    if random_clip is not None and max_frames is not None:
        last = probe(path)[0] - (max_frames - 1) * frame_stride
        start = int(random_clip.integers(max(last, 1)))
    with _reading(path):
        if _is_image(path):
            with Image.open(path) as image:
                frames = [np.asarray(ImageOps.exif_transpose(image).convert("RGB"))]
            fps = 0.0
        else:
            frames, fps = _decode(path, start, max_frames, frame_stride)
        if not frames:
            raise ValueError(f"it has no frame {start}")
    video = torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2).contiguous()
    return (video.float().div_(127.5).sub_(1) if normalize else video), fps


def write_video(path: str | os.PathLike[str], video: torch.Tensor, *, fps: float = 8.0, scale: int = 1, loop: bool = True) -> Path:
    """Write a video as .mp4 (H.264) or .gif, or a single frame as .png; returns the path.

        write_video("out.mp4", video)               # video [3, 8, 32, 48], uint8 or float in [-1, 1]
        write_video("out.gif", video, scale=8)      # 256 x 384 pixels, each a block of 8 x 8

    scale: whole factor by which pixels are repeated, so that a tiny video can be seen. loop: whether a GIF repeats.
    H.264 in 4:2:0 needs even sizes: an odd height or width is padded by repeating its last row or column. Missing folders
    are made. Raises ValueError for a shape, dtype or suffix that cannot be written.
    """
    path, frames = Path(path), _frames_uint8("write_video", video)
    if scale < 1 or fps <= 0:
        raise ValueError(f"write_video: need scale >= 1 and fps > 0, got scale={scale}, fps={fps}")
    frames = frames.repeat(scale, axis=1).repeat(scale, axis=2)
    suffix = path.suffix.lower()
    if suffix not in (".mp4", ".gif", ".png"):
        raise ValueError(f"write_video: path must end in .mp4, .gif or .png, got {path.name!r}")
    if suffix == ".png" and len(frames) != 1:
        raise ValueError(f"write_video: a .png holds 1 frame, video has {len(frames)}; use .mp4, .gif or contact_sheet")
    with whole_file(path) as temporary:
        if suffix == ".mp4":
            _encode_mp4(temporary, frames, fps)
        elif suffix == ".gif":
            images = [Image.fromarray(frame) for frame in frames]
            more = {"loop": 0} if loop else {}
            options: dict[str, Any] = {"save_all": True, "append_images": images[1:], "duration": round(1000 / fps), **more}
            images[0].save(temporary, **options)
        else:
            Image.fromarray(frames[0]).save(temporary)
    return path


def contact_sheet(
    path: str | os.PathLike[str],
    videos: Sequence[torch.Tensor],
    captions: Sequence[str],
    *,
    columns: int = 8,
    cell: int = 128,
) -> Path:
    """Write a PNG that shows each video as a row of frames over time, with its caption above; returns the path.

        contact_sheet("samples.png", [video, image], ["a red circle moves right", "a blue star"])

    videos: [3, T, H, W] each, of any sizes. columns: the most frames in a row, spread evenly from first to last. cell: about
    how many pixels the longer side of a frame takes; small frames are enlarged by whole factors, pixels kept sharp.
    """
    path = Path(path)
    if len(videos) != len(captions) or not videos:
        raise ValueError(f"contact_sheet: need as many captions as videos, got {len(captions)} and {len(videos)}")
    if columns < 1 or cell < 1:
        raise ValueError(f"contact_sheet: columns and cell must be at least 1, got {columns} and {cell}")
    gap, size = 4, 15
    font = ImageFont.load_default(size)
    rows = []
    for video in videos:
        frames = _frames_uint8("contact_sheet", video)
        picked = frames[np.linspace(0, len(frames) - 1, min(columns, len(frames))).round().astype(int)]
        longer = max(picked.shape[1:3])
        factor = max(cell // longer, 1) if longer <= cell else cell / longer
        width, height = (max(round(side * factor), 1) for side in (picked.shape[2], picked.shape[1]))
        method = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.BOX
        rows.append([Image.fromarray(frame).resize((width, height), method) for frame in picked])
    sheet_width = max(max(len(row) * (row[0].width + gap) for row in rows) + gap, 480)
    texts = [_wrap(caption, sheet_width - 2 * gap, font) for caption in captions]
    line = size + 3
    heights = [len(text) * line + row[0].height + 3 * gap for text, row in zip(texts, rows, strict=True)]
    sheet = Image.new("RGB", (sheet_width, sum(heights) + gap), (250, 250, 250))
    draw, y = ImageDraw.Draw(sheet), gap
    for text, row, height in zip(texts, rows, heights, strict=True):
        draw.text((gap, y), "\n".join(text), fill=(20, 20, 20), font=font, spacing=3)
        for i, image in enumerate(row):
            sheet.paste(image, (gap + i * (image.width + gap), y + len(text) * line))
        y += height
    with whole_file(path) as temporary:
        sheet.save(temporary, format="PNG")
    return path


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn whatever a decoder raises on a bad file into one MediaError that names it."""
    try:
        yield
    except (av.FFmpegError, OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        if isinstance(error, FileNotFoundError):
            reason = "it does not exist"
        elif isinstance(error, (av.FFmpegError, OSError)):
            reason = (error.strerror or str(error)).lower()
        else:
            reason = str(error)
        raise MediaError(f"cannot read {path}: {reason}") from error


def _video_stream(container: av.container.InputContainer) -> av.VideoStream:
    if not container.streams.video:
        raise ValueError("it has no video stream")
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    return stream


def _decode(path: Path, start: int, max_frames: int | None, stride: int) -> tuple[list[np.ndarray], float]:
    with av.open(str(path)) as container:
        stream = _video_stream(container)
        rate = stream.average_rate or stream.guessed_rate or Fraction(1)
        frames: list[np.ndarray] = []
        first = _seek(container, stream, start, rate) if start > SEEK_FROM else 0
        for index, frame in enumerate(container.decode(stream), first):
            if index < start or (index - start) % stride:
                continue
            pixels = frame.to_ndarray(format="rgb24")
            if frame.rotation % 360:
                pixels = np.rot90(pixels, frame.rotation // 90)  # both count anticlockwise
            if frames and pixels.shape != frames[0].shape:
                raise ValueError(f"its size changes from {frames[0].shape[:2]} to {pixels.shape[:2]} at frame {index}")
            frames.append(pixels)
            if len(frames) == max_frames:
                break
        return frames, float(rate / stride)


def _seek(container: av.container.InputContainer, stream: av.VideoStream, start: int, rate: Fraction) -> int:
    """Go to the last key frame not after frame `start`; returns the number of that key frame."""
    origin, tick = stream.start_time or 0, stream.time_base or 1 / rate
    container.seek(origin + int(start / rate / tick), stream=stream)
    first = next(container.decode(stream), None)
    if first is None or first.pts is None:
        raise ValueError(f"it has no frame {start}")
    container.seek(first.pts, stream=stream)  # the frame just decoded is wanted again
    return round((first.pts - origin) * tick * rate)


def _frames_uint8(op: str, video: torch.Tensor) -> np.ndarray:
    """[3, T, H, W] uint8 or float in [-1, 1] -> uint8 [T, H, W, 3]."""
    if video.ndim != 4 or video.shape[0] != 3 or 0 in video.shape:
        raise ValueError(f"{op}: video must be [3, T, H, W], got {list(video.shape)}")
    video = video.detach().cpu()
    if video.is_floating_point():
        broken = video.isnan().any(3).any(2).any(0).nonzero()
        if len(broken):
            raise ValueError(f"{op}: video must be numbers in [-1, 1], got NaN in frame {int(broken[0])}")
        video = ((video.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    if video.dtype != torch.uint8:
        raise ValueError(f"{op}: video must be uint8 or floating point in [-1, 1], got {video.dtype}")
    return video.permute(1, 2, 3, 0).contiguous().numpy()


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _encode_mp4(path: Path, frames: np.ndarray, fps: float) -> None:
    height, width = frames.shape[1:3]
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "16"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
