"""Functions in processes whose n-th system call on a folder is the last one, or fails: `Interposed`.

A process that has imported everything forks for every call of a function.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from .fork import fork

HANG = 120  # seconds
ROOT = Path(__file__).parents[2]
SOURCE, LIBRARY = Path(__file__).with_name("interposer.c"), ROOT / "build" / "interposer.so"


class Fault(IntEnum):
    """What happens from a call on: enum mode of interposer.c."""

    nothing = 0
    killed = 1
    full_disk = 2
    io_errors = 3
    read_only = 4
    interrupted = 5
    short_writes = 6


class Ended(NamedTuple):
    """How a child ended: its exit status, negative for a signal as of subprocess, and what it printed."""

    status: int
    output: str


def build() -> Path:
    """Compiles the interposer, unless it is newer than its source. Under another name first: tests run side by side."""
    if not LIBRARY.exists() or LIBRARY.stat().st_mtime < SOURCE.stat().st_mtime:
        LIBRARY.parent.mkdir(exist_ok=True)
        partial = LIBRARY.with_name(f"{LIBRARY.name}.{os.getpid()}")
        compiler = os.environ.get("CC", "cc")
        subprocess.run([compiler, "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", partial, SOURCE], check=True)
        partial.replace(LIBRARY)
    return LIBRARY


class Interposed:
    """The interposer, for forks of this process."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(build()))
        self._library.arm.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_long, ctypes.c_int]
        self._library.disarm.restype = ctypes.c_long

    def arm(self, folder: Path, spare: Path, at: int, fault: Fault) -> None:
        """Counts this process's calls below a folder from now on. `spare`, another one, gets the journal and what is kept."""
        (spare / "kept").mkdir(parents=True)
        paths = (os.fsencode(one) for one in (folder, spare / "journal", spare / "kept"))
        error = self._library.arm(*paths, at, fault)
        if error:
            raise OSError(error, f"seccomp: {os.strerror(error)}")

    def disarm(self) -> int:
        """Ends the count and returns it."""
        return self._library.disarm()


def in_child(function: Callable[[], int | None], log: Path) -> Ended:
    """Calls a function in a fork of this process. Its result is the exit status; a signal ends one that hangs. See `fork`."""

    def timed() -> int | None:
        signal.alarm(HANG)
        return function()

    with log.open("w") as output:
        _, waited = os.waitpid(fork(timed, output.fileno()), 0)
    return Ended(os.waitstatus_to_exitcode(waited), log.read_text(errors="replace"))


def emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
