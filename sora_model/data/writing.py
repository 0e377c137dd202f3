"""Write videos and images: `write_video`, `contact_sheet`. Files are written whole or not at all.

>>> write_video("cat.gif", video, fps=8)
PosixPath('cat.gif')
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.container import OutputContainer
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image, ImageDraw, ImageFont

from ..storage.files import whole_file
from .metadata import add_gif_comment, png_comment

BT709 = 1  # FFmpeg's number of it, as primaries, transfer curve and matrix
LOWEST_FPS = 0.01


def highest_fps(suffix: str) -> int:
    """Frames per second that files of a kind can have: the shortest delay of a GIF that is shown everywhere is 2/100 s."""
    return 50 if suffix == ".gif" else 1000


def write_video(
    path: str | os.PathLike[str],
    video: torch.Tensor,
    *,
    fps: float = 8.0,
    scale: int = 1,
    loop: bool = True,
    comment: str | None = None,
) -> Path:
    """Write a video as .mp4 (H.264) or .gif, or a single frame as .png; returns the path.

    >>> video = torch.zeros(3, 8, 32, 48)  # uint8 or float in [-1, 1]
    >>> write_video("out.mp4", video)
    PosixPath('out.mp4')
    >>> path = write_video("out.gif", video, scale=8)  # 256 x 384, each pixel a block of 8 x 8

    fps: from 1/100 to 1000; of a GIF to 50, as the shortest delay that is shown everywhere is 2/100 s. A GIF's delays are whole
    hundredths of a second, rounded so that no frame is more than half of one early or late. scale: whole factor by which pixels
    are repeated, so that a tiny video can be seen. loop: whether a GIF repeats. comment: text that the file carries, see
    `read_comment`.

    H.264 in 4:2:0 needs even sizes: an odd height or width is padded by repeating its last row or column. Its colours are BT.709
    at any size, and tagged as such. A GIF's frames have up to 256 colours each. Missing folders are made. Raises ValueError for
    a shape, dtype, rate or suffix that cannot be written.
    """
    path, frames = Path(path), _frames_uint8("write_video", video)
    if scale < 1:
        raise ValueError(f"write_video: scale must be at least 1, got {scale}")
    suffix = path.suffix.lower()
    if suffix not in (".mp4", ".gif", ".png"):
        raise ValueError(f"write_video: path must end in .mp4, .gif or .png, got {path.name!r}")
    if not LOWEST_FPS <= fps <= highest_fps(suffix):
        raise ValueError(f"write_video: fps of a {suffix} must be from {LOWEST_FPS} to {highest_fps(suffix)}, got {fps}")
    if suffix == ".png" and len(frames) != 1:
        raise ValueError(f"write_video: a .png holds 1 frame, video has {len(frames)}; use .mp4, .gif or contact_sheet")
    # One by one, as all of them may not fit into memory.
    enlarged = (frame.repeat(scale, axis=0).repeat(scale, axis=1) for frame in frames)
    height, width = (scale * side for side in frames.shape[1:3])
    with whole_file(path) as temporary:
        if suffix == ".mp4":
            _encode_mp4(temporary, enlarged, height, width, fps, comment)
        elif suffix == ".gif":
            _encode_gif(temporary, enlarged, height, width, fps, len(frames), loop)
            if comment is not None:
                add_gif_comment(temporary, comment)
        else:
            Image.fromarray(next(enlarged)).save(temporary, pnginfo=None if comment is None else png_comment(comment))
    return path


def contact_sheet(
    path: str | os.PathLike[str],
    videos: Sequence[torch.Tensor],
    captions: Sequence[str],
    *,
    columns: int = 8,
    cell: int = 128,
    comment: str | None = None,
) -> Path:
    """Write a PNG that shows each video as a row of frames over time, with its caption above; returns the path.

    >>> contact_sheet("samples.png", [video, video[:, :1]], ["a red circle moves right", "a red circle"])
    PosixPath('samples.png')

    videos: [3, T, H, W] each, of any sizes. columns: the most frames in a row, spread evenly from first to last. cell: about
    how many pixels the longer side of a frame takes; small frames are enlarged by whole factors, pixels kept sharp. comment: text
    that the file carries.
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
        sheet.save(temporary, format="PNG", pnginfo=None if comment is None else png_comment(comment))
    return path


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


@contextlib.contextmanager
def _container(path: Path, format: str, options: dict[str, str] | None = None) -> Iterator[OutputContainer]:
    """A file to write frames to. Python writes it, as FFmpeg gives up on a write that a signal interrupts."""
    with path.open("wb") as file, av.open(file, "w", format=format, options=options or {}) as container:
        yield container


def _encode_mp4(path: Path, frames: Iterable[np.ndarray], height: int, width: int, fps: float, comment: str | None) -> None:
    odd = (0, height % 2), (0, width % 2), (0, 0)
    with _container(path, "mp4") as container:
        if comment is not None:
            container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "16"})
        stream.height, stream.width = height + height % 2, width + width % 2
        stream.pix_fmt = "yuv420p"
        tags = stream.codec_context
        tags.color_primaries = tags.color_trc = tags.colorspace = BT709
        tags.color_range = ColorRange.MPEG
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.pad(pixels, odd, mode="edge"), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _encode_gif(path: Path, frames: Iterable[np.ndarray], height: int, width: int, fps: float, count: int, loop: bool) -> None:
    """With a palette per frame. Pillow would leave out frames that are equal to the one before."""
    tick = Fraction(1, 100)
    starts = [math.floor(i / (fps * tick) + 0.5) for i in range(count + 1)]
    options = {"loop": "0" if loop else "-1", "final_delay": str(starts[-1] - starts[-2])}
    with _container(path, "gif", options) as container:
        stream = container.add_stream("gif", rate=100)
        stream.height, stream.width = height, width
        stream.pix_fmt = "pal8"
        for pixels, start in zip(frames, starts, strict=False):
            image = Image.fromarray(pixels).quantize(256)
            colours = np.asarray(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
            palette = np.zeros((256, 4), np.uint8)  # alpha, red, green, blue
            palette[: len(colours)] = np.insert(colours, 0, 255, axis=1)
            frame = av.VideoFrame.from_ndarray((np.asarray(image), palette), format="pal8")  # type: ignore[arg-type]
            frame.pts, frame.time_base = start, tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
