"""Media files that somebody has damaged or made up, and the commands that read them.

    python tests/mutated_media.py 200

makes so many files from some seeds of every format, by rules that a number seeds, and runs `sora caption`, `sora animate` and
`sora train` on each, in a process of its own. Each command must end well or with one line that names the file; training, which
has a sound file too, must go on without the other. It prints the most memory and time that any of them took, and fails where one
took more than 1 GiB or 10 seconds, raised anything else or was killed.
"""

from __future__ import annotations

import os
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import zlib
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np
from media_files import TURNS, encode, numbered
from PIL import Image

MEMORY, SECONDS = 2**30, 10
FAST = {"deadline": "realtime", "cpu-used": "8"}


def make_seeds(folder: Path) -> list[Path]:
    """Small sound files of all the formats that are read."""
    frames = numbered(12, 32, 48)
    images = [Image.fromarray(frame) for frame in frames]
    clear = [Image.fromarray(np.dstack([frame, frame[..., 0]])) for frame in frames]
    exif = Image.Exif()
    exif[0x0112] = 6
    several = {"save_all": True, "duration": 80}
    images[0].save(folder / "rgb.png", exif=exif)
    clear[0].save(folder / "rgba.png")
    images[0].quantize(16).save(folder / "palette.png", transparency=0)
    Image.fromarray(frames[3][..., 0].astype(np.uint16) * 257).save(folder / "deep.png")
    clear[0].save(folder / "moving.png", append_images=clear[1:], **several)
    images[1].save(folder / "baseline.jpg", exif=exif)
    images[1].save(folder / "progressive.jpg", progressive=True)
    images[1].convert("CMYK").save(folder / "cmyk.jpeg")
    images[2].save(folder / "lossy.webp")
    clear[2].save(folder / "moving.webp", append_images=clear[3:], lossless=True, **several)
    images[4].save(folder / "a.bmp")
    images[4].save(folder / "a.gif", append_images=images[5:], **several)
    for orientation in (1, 5, 6):
        encode(folder / f"h264-{orientation}.mp4", frames, matrix=TURNS[orientation], aspect=Fraction(4, 3))
    encode(folder / "b-frames.mkv", frames, options={"bf": "3", "g": "6"})
    encode(folder / "fragments.mp4", frames, options={"g": "4", "movflags": "frag_keyframe+empty_moov"})
    encode(folder / "vp9.webm", frames, codec="libvpx-vp9", options=FAST)
    encode(
        folder / "clear.webm", np.stack([np.asarray(one) for one in clear]), codec="libvpx-vp9", pix_fmt="yuva420p", options=FAST
    )
    encode(folder / "mpeg4.avi", frames, codec="mpeg4")
    encode(folder / "mjpeg.mov", frames, codec="mjpeg", pix_fmt="yuvj420p", matrix=TURNS[3])
    return sorted(folder.iterdir())


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """A file's bytes, damaged in one way or several."""
    for _ in range(int(rng.integers(1, 3))):
        way = (_flipped, _cut, _blanked, _inserted, _repeated, _resized)[int(rng.integers(6))]
        data = way(bytearray(data), rng) or b"\0"
    return data


def _flipped(data: bytearray, rng: np.random.Generator) -> bytes:
    for place in rng.integers(len(data), size=int(rng.integers(1, 17))):
        data[place] = int(rng.integers(256))
    return bytes(data)


def _cut(data: bytearray, rng: np.random.Generator) -> bytes:
    return bytes(data[: int(rng.integers(len(data)))])


def _blanked(data: bytearray, rng: np.random.Generator) -> bytes:
    start, length = int(rng.integers(len(data))), int(rng.integers(1, 200))
    data[start : start + length] = bytes(len(data[start : start + length]))
    return bytes(data)


def _inserted(data: bytearray, rng: np.random.Generator) -> bytes:
    start = int(rng.integers(len(data)))
    data[start:start] = rng.bytes(int(rng.integers(1, 64)))
    return bytes(data)


def _repeated(data: bytearray, rng: np.random.Generator) -> bytes:
    start, length = int(rng.integers(len(data))), int(rng.integers(1, 2000))
    data[start:start] = data[start : start + length]
    return bytes(data)


def _resized(data: bytearray, rng: np.random.Generator) -> bytes:
    """Another number in the header, a large one mostly; a PNG's width and height with a checksum that is right."""
    large = int(rng.choice([0, 1, 255, 4096, 12_000, 65_535, 2**24, 2**31 - 1, 2**32 - 1]))
    if data[:4] == b"\x89PNG" and len(data) > 33:
        place = 16 + 4 * int(rng.integers(2))
        data[place : place + 4] = struct.pack(">I", large)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
        return bytes(data)
    kind = str(rng.choice([">I", "<I", ">H", "<H"]))
    number = struct.pack(kind, large & (2 ** (8 * struct.calcsize(kind)) - 1))
    place = int(rng.integers(min(len(data), 800)))
    data[place : place + len(number)] = number
    return bytes(data)


def make_mutants(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """`count` damaged files, as many of each seed."""
    (folder / "seeds").mkdir(parents=True)
    seeds, made = make_seeds(folder / "seeds"), []
    for number in range(count):
        origin = seeds[number % len(seeds)]
        path = folder / f"{number:03d}-{origin.name}"
        path.write_bytes(mutated(origin.read_bytes(), np.random.default_rng((seed, number))))
        made.append(path)
    return made


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    seconds: float
    memory: int
    text: str


def in_a_process(arguments: list[str]) -> Ended:
    """Runs a command of `sora` in a fork of this process, which has imported what it needs."""
    with tempfile.TemporaryFile("w+") as output:
        start = time.perf_counter()
        child = os.fork()
        if not child:
            code = 70
            try:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
                from sora_model.cli import app

                app(arguments)
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status, usage = os.wait4(child, 0)
        seconds = time.perf_counter() - start
        output.seek(0)
        return Ended(os.waitstatus_to_exitcode(status), seconds, usage.ru_maxrss * 1024, output.read())


def commands(path: Path, folder: Path) -> dict[str, list[str]]:
    """The commands that read a file, which write to `folder`."""
    clips = folder / "clips"
    shutil.rmtree(folder, ignore_errors=True)
    clips.mkdir(parents=True)
    shutil.copy(path, clips / path.name)
    (clips / path.name).with_suffix(".txt").write_text("a damaged file")
    encode(clips / "sound.mp4", numbered(12))
    (clips / "sound.txt").write_text("a sound file")
    return {
        "caption": ["caption", str(path)],
        "animate": ["animate", str(path), "a cat", "--steps", "1", "--frames", "5", "--out", str(folder / "out")],
        "train": ["train", str(folder / "run"), "--data", str(clips), "--steps", "1", "--tokens", "512"],
    }


def main(count: int) -> int:
    for name in ("sora_model.cli", "sora_model.pipeline.pipeline", "sora_model.training.dit"):
        import_module(name)  # once, for all the forks
    failed, endings = 0, {"caption": [], "animate": [], "train": []}
    with tempfile.TemporaryDirectory() as name:
        for path in make_mutants(Path(name) / "media", count):
            for command, arguments in commands(path, Path(name) / "work").items():
                ended = in_a_process(arguments)
                endings[command].append(ended)
                one_line = ended.code == 2 and path.name in ended.text and "Traceback" not in ended.text
                sound = "checkpoint: " in ended.text if command == "train" else ended.code == 0 or one_line
                if not sound or ended.memory > MEMORY or ended.seconds > SECONDS:
                    failed += 1
                    print(f"{path.name}: {command}: {ended.code}, {ended.seconds:.1f} s, {ended.memory >> 20} MiB\n{ended.text}")
    for command, all_of_it in endings.items():
        read = sum(ended.code == 0 for ended in all_of_it)
        most, longest = max(ended.memory for ended in all_of_it), max(ended.seconds for ended in all_of_it)
        print(f"{command}: {len(all_of_it)} files, {read} end well; at most {most >> 20} MiB, {longest:.1f} s")
    print(f"{failed} failures")
    return min(failed, 1)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout that this file is in, whatever is installed
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 200))
