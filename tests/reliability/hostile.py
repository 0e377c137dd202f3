"""Media files that were made to do harm: `make_bombs`, small ones that ask for much, and `make_tricks`, which name other files."""

from __future__ import annotations

import io
import socket
import struct
import zlib
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from tests.media_files import encode, numbered

TINY_FRAMES = 100_000
HOURS = 3_600_000  # milliseconds


class Hostile(NamedTuple):
    """may_end_well: whether a command may take it for a sound file."""

    path: Path
    may_end_well: bool = True


class Listener:
    """A port of this machine that nothing may connect to."""

    def __enter__(self) -> Listener:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._socket.setblocking(False)
        self.port = self._socket.getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def was_called(self) -> bool:
        """Whether somebody has connected since the last time."""
        try:
            self._socket.accept()[0].close()
        except BlockingIOError:
            return False
        return True


def chunk(kind: bytes, data: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes, data: bytes | None = None) -> bytes:
    """A grey one of one bit a pixel, with more chunks before its pixels."""
    if data is None:
        packer = zlib.compressobj(9)
        row = bytes(1 + -(-width // 8))
        block = row * max(1, min(height, 2**22 // len(row)))
        whole, rest = divmod(height * len(row), len(block))
        data = b"".join(packer.compress(block) for _ in range(whole)) + packer.compress(block[:rest]) + packer.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def deflated_zeros(size: int) -> bytes:
    packer = zlib.compressobj(9)
    block = bytes(2**20)
    return b"".join(packer.compress(block) for _ in range(size // len(block))) + packer.flush()


def box(kind: bytes, data: bytes) -> bytes:
    """Of an MP4."""
    return struct.pack(">I", 8 + len(data)) + kind + data


def nested_boxes(kind: bytes, depth: int) -> bytes:
    """A box in a box in a box."""
    sizes = [struct.pack(">I", 8 * (depth - i)) + kind for i in range(depth)]
    return b"".join(sizes)


def tiny_gif(frames: int) -> bytes:
    """1x1 pixels, `frames` times."""
    frame = b"\x21\xf9\x04\x00\x04\x00\x00\x00" + b"\x2c\0\0\0\0\x01\0\x01\0\x00" + b"\x02\x02\x44\x01\x00"
    return b"GIF89a\x01\0\x01\0\x80\0\0" + b"\0\0\0\xff\xff\xff" + frame * frames + b"\x3b"


def with_exif(data: bytes) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (32, 32)).save(stream, "JPEG", exif=b"Exif\0\0" + data)
    return stream.getvalue()


def make_bombs(folder: Path) -> list[Hostile]:
    """Small files that ask for much memory or time."""
    folder.mkdir(parents=True, exist_ok=True)
    refused: dict[str, bytes] = {
        "long.png": png(240, 400_000),
        "wide.png": png(400_000, 240),
        "largest.png": png(2**31 - 1, 2**31 - 1, data=b"\0"),
        "nested.mp4": box(b"ftyp", b"isom\0\0\2\0isom") + nested_boxes(b"moov", 200_000),
        "nested-udta.mp4": box(b"ftyp", b"isom\0\0\2\0isom") + nested_boxes(b"udta", 200_000),
        "empty.mp4": b"",
        "zeros.mkv": bytes(2**20),
    }
    read: dict[str, bytes] = {
        "text.png": png(32, 32, chunk(b"zTXt", b"Comment\0\0" + deflated_zeros(2**30))),
        "texts.png": png(32, 32, *[chunk(b"zTXt", b"a%d\0\0" % i + deflated_zeros(2**20)) for i in range(500)]),
        "international.png": png(32, 32, chunk(b"iTXt", b"Comment\0\1\0\0\0" + deflated_zeros(2**29))),
        "profile.png": png(32, 32, chunk(b"iCCP", b"profile\0\0" + deflated_zeros(2**30))),
        "frames.png": png(32, 32, chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0))),
        "frames.gif": tiny_gif(TINY_FRAMES),
        "exif-noise.jpg": with_exif(np.random.default_rng(0).bytes(60_000)),
        "exif-loop.jpg": with_exif(b"II*\0\x08\0\0\0" + b"\x01\0" + struct.pack("<HHII", 0x8769, 4, 1, 8) + struct.pack("<I", 8)),
        "exif-count.jpg": with_exif(b"II*\0\x08\0\0\0" + b"\x01\0" + struct.pack("<HHII", 0x0112, 3, 2**32 - 1, 8) + b"\0\0\0\0"),
    }
    for name, data in {**refused, **read}.items():
        (folder / name).write_bytes(data)
    Image.new("L", (12_000, 12_000)).save(folder / "large.jpg", quality=1)
    Image.new("L", (12_000, 12_000)).save(folder / "progressive.jpg", quality=1, progressive=True)
    Image.new("L", (8000, 8000)).save(folder / "large.webp", quality=1, method=0)
    encode(folder / "large.mp4", np.zeros((32, 4096, 4096, 3), np.uint8), options={"preset": "ultrafast", "crf": "51"})
    _says_hours(folder / "hours.mkv")
    _with_gaps(folder / "gaps.mkv")
    refused_too = ["progressive.jpg", "large.webp"]
    names = [*read, "large.jpg", "large.mp4", "hours.mkv", "gaps.mkv"]
    return [*(Hostile(folder / name, False) for name in [*refused, *refused_too]), *(Hostile(folder / name) for name in names)]


def _says_hours(path: Path) -> None:
    """A Matroska file of 3 frames that says that it lasts 1000 hours."""
    encode(path, numbered(3))
    data = bytearray(path.read_bytes())
    place = data.find(b"\x44\x89\x88")  # Duration, a double
    assert place > 0, "FFmpeg writes durations in another way"
    data[place + 3 : place + 11] = struct.pack(">d", 1000.0 * HOURS)
    path.write_bytes(bytes(data))


def _with_gaps(path: Path) -> None:
    """Three frames, days apart."""
    encode(path, numbered(3), stamps=[0, 1, 2**30], tick=Fraction(1, 1000))


def make_tricks(folder: Path, port: int) -> list[Hostile]:
    """Files that name another file, a program or an address, under the suffix of a picture or video; none may be read.

    port: of this machine, where something listens that must not be called.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder.parent / "secret.mp4"
    encode(target, numbered(2))
    Image.new("RGB", (32, 32)).save(target.with_suffix(".png"))
    here, there = f"file:{target}", f"http://127.0.0.1:{port}/a.mp4"
    texts = {
        "playlist": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{here}\n#EXT-X-ENDLIST\n",
        "playlist-http": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{there}\n#EXT-X-ENDLIST\n",
        "playlist-key": f'#EXTM3U\n#EXT-X-KEY:METHOD=AES-128,URI="{there}"\n#EXTINF:1,\n{here}\n#EXT-X-ENDLIST\n',
        "list": f"ffconcat version 1.0\nfile {target}\n",
        "list-http": f"ffconcat version 1.0\nfile '{there}'\n",
        "dash": f'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period><AdaptationSet><Representation id="1">'
        f"<BaseURL>{there}</BaseURL></Representation></AdaptationSet></Period></MPD>",
        "sdp": f"v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {port} RTP/AVP 96\na=rtpmap:96 H264/90000\n",
        "filter": f"movie={target}",
        "sequence": "imf\n",
        "picture": f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"><image '
        f'xlink:href="{there}"/>'
        "</svg>",
        "page": f'<!DOCTYPE html><img src="{there}"><script>fetch("{there}")</script>',
        "vapoursynth": "import os\nos.system('touch ran')\n",
        "avisynth": f'FFVideoSource("{target}")\n',
        "ghostscript": "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n(ran) (w) file closefile\nshowpage\n%%EOF\n",
        "svg-script": f'push graphic-context\nimage over 0,0 0,0 "url({there})"\npop graphic-context\n',
    }
    made = []
    for name, text in texts.items():
        for suffix in (".mp4", ".png"):
            path = folder / f"{name}{suffix}"
            path.write_text(text)
            made.append(Hostile(path, False))
    Image.new("RGB", (32, 32)).save(folder / "postscript.png", format="EPS")
    Image.new("RGB", (32, 32)).save(folder / "postscript.jpg", format="EPS")
    made += [Hostile(folder / "postscript.png", False), Hostile(folder / "postscript.jpg", False)]
    return made
