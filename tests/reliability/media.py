"""Media files that somebody has damaged or made up, and the commands that read them: python -m tests.reliability.media 500

First come the bombs and tricks of `hostile.py`, then so many files that are made from seeds of every format by rules that a number
draws. `sora caption`, `sora animate` and `sora train` run on each, in a process of its own. A command must end well or with one
line that names the file; training, which has a sound file too, must go on without the other. A case fails where a command took
more than 10 seconds of a processor or 1 GiB beyond what its process began with, was killed, began another process, opened a
connection or wrote elsewhere. File i of a seed is always the same; a file that fails is printed with the command that repeats it.
"""

from __future__ import annotations

import argparse
import shutil
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from tests.media_files import TURNS, encode, numbered
from tests.reliability.guarded import Ended, in_a_process, sora
from tests.reliability.hostile import Hostile, Listener, make_bombs, make_tricks
from tests.reliability.outcome import Outcome

KINDS = ("bombs", "tricks", "mutants")
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


def run_all(path: Path, base: Path, *, well: bool = True) -> tuple[list[Ended], list[str]]:
    """How the commands on a file ended, and what is wrong with that.

    base: the folder of all files. well: whether it may be read.
    """
    work = base / "work"
    endings, faults = [], []
    for command, arguments in commands(path, work).items():
        ended = in_a_process(sora(arguments), writable=work, untrusted=path.parent, protected=base)
        endings.append(ended)
        if command != "train":
            found = ended.faults([path.name], well=well, more=True)
        else:  # the sound file is enough
            found = ended.faults([], more=True)
            found += [] if ended.code == 0 and "checkpoint: " in ended.text else ["does not go on"]
            found += [] if well or path.name in ended.text else ["takes the file"]
        if found:
            faults.append(f"{command}: {'; '.join(found)}\n{ended.text[-2000:]}")
    return endings, faults


class Case(NamedTuple):
    """A file. number: among those of its kind."""

    kind: str
    number: int
    file: Hostile


def drawn(base: Path, port: int, count: int, first: int, seed: int, only: str | None) -> list[Case]:
    """The files of a call of this program, made in a folder; port: as of `make_tricks`."""
    makers: dict[str, Callable[[], list[Hostile]]] = {
        "bombs": lambda: make_bombs(base / "bombs"),
        "tricks": lambda: make_tricks(base / "tricks", port),
        "mutants": lambda: [Hostile(path) for path in make_mutants(base / "mutants", first + count, seed)],
    }
    cases: list[Case] = []
    for kind in [only] if only else KINDS if first == 0 else KINDS[-1:]:
        files = [Case(kind, number, file) for number, file in enumerate(makers[kind]())]
        cases += files[first : first + count] if only or kind == "mutants" else files
    return cases


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, nargs="?", default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first file; bombs and tricks come with 0")
    parser.add_argument("--only", choices=KINDS, help="COUNT files of this kind")
    options = parser.parse_args()
    for name in ("sora_model.cli", "sora_model.pipeline.pipeline", "sora_model.training.dit"):
        import_module(name)  # once, for all the forks
    failed, endings = 0, []
    with tempfile.TemporaryDirectory() as name, Listener() as listener:
        base = Path(name)
        cases = drawn(base, listener.port, options.count, options.first, options.seed, options.only)
        for case in cases:
            ended, faults = run_all(case.file.path, base, well=case.file.may_end_well)
            if listener.was_called():
                faults.append("a connection was opened")
            endings += ended
            if faults:
                failed += 1
                print(f"python -m tests.reliability.media 1 --only {case.kind} --seed {options.seed} --first {case.number}")
                print(f"  {case.file.path.name}", *faults, sep="\n", flush=True)
    most = max((one.more for one in endings), default=0)
    longest = max((one.seconds for one in endings), default=0.0)
    print(Outcome("media files", len(cases), failed, seconds=longest, memory=max(most, 0)))
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
