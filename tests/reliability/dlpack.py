"""Bytes of any kind as descriptions of tensors, by libFuzzer: python -m tests.reliability.dlpack 60

Builds fuzz_dlpack.cpp with clang, AddressSanitizer and UndefinedBehaviorSanitizer, and runs it for so many seconds, or with --runs
for so many inputs, from a corpus of small tensors. What it finds is written to build/fuzz, and named: the program run with the file
repeats it.
"""

from __future__ import annotations

import argparse
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

from .outcome import Outcome

HERE = Path(__file__).parent
BUILD = HERE.parent.parent / "build" / "fuzz"
FLAGS = "-std=c++17 -O1 -g1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all"
TYPES = {"float32": 0, "float16": 1, "bfloat16": 2, "int32": 3, "float64": 4}  # fuzz_dlpack.cpp's kTypes
LONGEST = 700  # bytes of an input
EXECUTIONS = re.compile(r"stat::number_of_executed_units: (\d+)")


def compiler() -> str | None:
    """clang++, if it can build fuzzers here."""
    path = shutil.which("clang++")
    if path is None:
        return None
    source = 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }'
    command = [path, "-x", "c++", "-fsanitize=fuzzer,address,undefined", "-", "-o", "/dev/null"]
    return path if subprocess.run(command, input=source.encode(), capture_output=True, check=False).returncode == 0 else None


def build() -> Path:
    """The fuzzer; RuntimeError with the compiler's words if it fails."""
    BUILD.mkdir(parents=True, exist_ok=True)
    program = BUILD / "dlpack"
    command = [compiler() or "clang++", *FLAGS.split(), HERE / "fuzz_dlpack.cpp", "-o", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the fuzzer could not be built:\n{done.stderr}")
    return program


def described(sizes: tuple[int, ...], strides: tuple[int, ...] | None, dtype: str, offset: int) -> bytes:
    """A tensor as fuzz_dlpack.cpp reads it."""
    axes = sizes + (0,) * (8 - len(sizes)), (strides or ()) + (0,) * (8 - len(strides or ()))
    numbers = b"".join(bytes([n]) if n < 9 else struct.pack("<Bh", 210, n) for axis in axes for n in axis)
    return bytes([2 if strides is None else 0, len(sizes)]) + numbers + struct.pack("<HB", offset, TYPES[dtype])


def write_corpus(folder: Path) -> None:
    """Calls that are right: rows, heads, and boundaries with their grids."""
    calls = []
    for i, dtype in enumerate(TYPES):
        x = described((4, 8), (8, 1), dtype, 0)
        wide = described((2, 4, 2, 4), (32, 8, 4, 1), dtype, 1024)
        for first in (x, wide):
            for out in (described((4, 8), None, dtype, 2048), described((8, 4), (1, 8), dtype, 2048 + 64 * i)):
                calls.append(first + b"\0" + out + described((3,), (2,), "float32", 3584))
                calls.append(first + b"\xff" + described((3,), (1,), "int32", 3072) + out + out)
    cu, grid = described((2,), (1,), "int32", 64), described((1, 3), (3, 1), "int32", 0)
    calls.append(
        grid + b"\xff" + cu + described((4, 8), (8, 1), "float32", 1024) * 2 + bytes([1, 2, 2]) + bytes(13) + bytes([0, 4])
    )
    folder.mkdir(parents=True, exist_ok=True)
    for i, call in enumerate(calls):
        (folder / f"call-{i}").write_bytes(call)


def fuzz(seconds: int, runs: int = -1, seed: int = 1) -> tuple[Outcome, str]:
    """What came of it, and what the fuzzer said."""
    program, corpus = build(), BUILD / "corpus"
    write_corpus(corpus)
    limits = [
        f"-max_total_time={seconds}",
        f"-runs={runs}",
        f"-seed={seed}",
        f"-max_len={LONGEST}",
        "-timeout=10",
        "-rss_limit_mb=1024",
    ]
    command = [program, corpus, *limits, f"-artifact_prefix={BUILD}/", "-print_final_stats=1"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    found = EXECUTIONS.search(done.stderr)
    return Outcome("DLPack decoding", int(found[1]) if found else 0, int(done.returncode != 0)), done.stderr


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seconds", type=int, help="of libFuzzer")
    parser.add_argument("--runs", type=int, default=-1, help="so many inputs, if that takes less time")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if compiler() is None:
        print("tests.reliability.dlpack: needs clang++ with libFuzzer (Debian: clang and libclang-rt-14-dev)", file=sys.stderr)
        print(Outcome("DLPack decoding", 0, 1))  # among parts that run, one that cannot is a failure, too
        return 2
    outcome, said = fuzz(options.seconds, options.runs, options.seed)
    if outcome.failed:
        print(said[-6000:])
    print(outcome)
    return 1 if outcome.failed else 0


if __name__ == "__main__":
    sys.exit(main())
