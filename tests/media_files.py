"""Makes media files of all kinds, by libraries that sora_model's writer has no part in."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

TURNS = {  # display matrix, orientation as in EXIF: its number
    1: (1, 0, 0, 1), 2: (-1, 0, 0, 1), 3: (-1, 0, 0, -1), 4: (1, 0, 0, -1),
    5: (0, 1, 1, 0), 6: (0, 1, -1, 0), 7: (0, -1, -1, 0), 8: (0, -1, 1, 0),
}  # fmt: skip


def numbered(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """uint8 [T, H, W, 3]: each frame shows its number in grey blocks of 8 bits; `number_of` reads it back."""
    frames = np.full((count, height, width, 3), 128, np.uint8)
    for number in range(count):
        for bit in range(8):
            column = bit * width // 8
            frames[number, :, column : column + width // 8] = 224 if number >> bit & 1 else 32
    return frames


def number_of(pixels: np.ndarray) -> int:
    """[H, W, 3] -> the number that it shows."""
    width = pixels.shape[1]
    return sum(int(pixels[:, bit * width // 8 + 1 : (bit + 1) * width // 8 - 1].mean() > 128) << bit for bit in range(8))


def encode(
    path: Path,
    frames: np.ndarray,
    *,
    codec: str = "libx264",
    rate: int = 30,
    stamps: list[int] | None = None,
    tick: Fraction | None = None,
    options: dict[str, str] | None = None,
    pix_fmt: str = "yuv420p",
    format: str | None = None,
    matrix: tuple[int, int, int, int] | None = None,
    aspect: Fraction | None = None,
    colorspace: int | None = None,
    color_range: int | None = None,
    tagged: bool = False,
) -> Path:
    """frames: uint8 [T, H, W, 3], or RGBA. stamps: of the frames, in ticks. colorspace, color_range: of the pixels."""
    with av.open(f"file:{path}", "w", format=format) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        if matrix is not None:
            a, b, c, d = (65536 * value for value in matrix)
            stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if tick is not None:
            stream.codec_context.time_base = tick
        if tagged:
            stream.codec_context.colorspace, stream.codec_context.color_range = colorspace, color_range
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgba" if pixels.shape[2] == 4 else "rgb24")
            if pix_fmt not in ("rgb24", "rgba", "bgr24"):
                frame = frame.reformat(
                    format=pix_fmt,
                    dst_colorspace=Colorspace.ITU601 if colorspace is None else colorspace,
                    dst_color_range=ColorRange.MPEG if color_range is None else color_range,
                )
            frame.pts, frame.time_base = (stamps[number] if stamps else number), tick or Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
