"""What a media file says about itself in words: a comment of PNG, MP4 and GIF files, `read_comment` and how it is written."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .media import IMAGE_SUFFIXES, open_container, open_image, reading

BLOCK = 255  # bytes of a GIF's data block


def png_comment(text: str) -> PngInfo:
    """What Pillow takes as `pnginfo`: a chunk iTXt, in UTF-8."""
    info = PngInfo()
    info.add_itxt("Comment", text)
    return info


def add_gif_comment(path: Path, text: str) -> None:
    """Puts a comment extension in front of a GIF's first frame, where readers look for it; FFmpeg writes none."""
    data, flags = text.encode("ascii", "backslashreplace"), 10  # GIF's comments are in ASCII
    whole = path.read_bytes()
    palette = 3 * 2 ** ((whole[flags] & 7) + 1) if whole[flags] & 128 else 0
    start = 13 + palette  # behind the header, the screen's descriptor and its palette
    blocks = [data[i : i + BLOCK] for i in range(0, len(data), BLOCK)]
    comment = b"\x21\xfe" + b"".join(bytes([len(block)]) + block for block in blocks) + b"\x00"
    path.write_bytes(whole[:start] + comment + whole[start:])


def read_comment(path: str | os.PathLike[str]) -> str | None:
    """The comment in a video or image file, or None.

    >>> from sora_model.data import write_video
    >>> read_comment(write_video("00-a-cat-seed0.mp4", video, comment='{"prompt": "a cat", "seed": 0}'))
    '{"prompt": "a cat", "seed": 0}'

    Raises MediaError for a file that cannot be read.
    """
    path = Path(path)
    with reading(path):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            with open_image(path) as image:
                return _text(image.info.get("Comment"))
        if path.suffix.lower() == ".gif":
            with Image.open(path, formats=("GIF",)) as image:
                return _text(image.info.get("comment"))
        with open_container(path) as container:
            return _text(container.metadata.get("comment"))


def _text(found: object) -> str | None:
    return found.decode("ascii", "replace") if isinstance(found, bytes) else None if found is None else str(found)
