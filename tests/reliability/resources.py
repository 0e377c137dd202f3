"""What this process holds of the machine, and whether that drifts."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sora_kernels import memory

from .outcome import Outcome

WINDOWS = 10
WARM_UP = 0.25  # of what is measured
MOST_DRIFT, MOST_ALLOCATED = 0.02, 0.002


class Usage(NamedTuple):
    """Bytes and counts: resident (RSS), RSS without malloc's free chunks, handed out by malloc; open files, threads."""

    resident: int
    held: int
    allocated: int
    files: int
    threads: int


class Malloc(NamedTuple):
    """Bytes of all arenas of glibc's malloc: one for each thread that ever ran at once with others, and they grow ragged."""

    used: int
    free: int


def malloc() -> Malloc:
    libc = ctypes.CDLL(None)
    libc.fdopen.restype = ctypes.c_void_p
    with tempfile.TemporaryFile() as file:
        stream = ctypes.c_void_p(libc.fdopen(os.dup(file.fileno()), b"w"))
        libc.malloc_info(0, stream)
        libc.fclose(stream)
        file.seek(0)
        text = file.read().decode()
    totals = text[text.rindex("</heap>") :]
    free, mapped, system = (
        sum(map(int, re.findall(pattern, totals)))
        for pattern in (
            r'type="(?:fast|rest)" .*size="(\d+)"',
            r'type="mmap" .*size="(\d+)"',
            r'system type="current" size="(\d+)"',
        )
    )
    return Malloc(system - free + mapped, free)


def usage() -> Usage:
    """Without garbage and without the memory that is kept for outputs, which has limits of its own."""
    gc.collect()
    memory.empty_cache()
    heap = malloc()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    files, threads = (len(os.listdir(f"/proc/self/{name}")) for name in ("fd", "task"))
    return Usage(resident, resident - heap.free, heap.used, files, threads)


class Drift(NamedTuple):
    """slope: growth over all of it, by Theil and Sen. deviation: the largest of a window's median from the first one's. Shares."""

    slope: float
    deviation: float

    def __str__(self) -> str:
        return f"slope {100 * self.slope:+.2f} %, at most {100 * self.deviation:.2f} % from the first window"


def drift(values: Sequence[float]) -> Drift:
    """Of the medians of WINDOWS windows, or up to twice as many; values from the warm-up are left out by the caller."""
    size = max(1, len(values) // WINDOWS)
    medians = [statistics.median(values[i : i + size]) for i in range(0, len(values) - size + 1, size)]
    pairs = [(i, j) for j in range(len(medians)) for i in range(j)]
    slope = statistics.median((medians[j] - medians[i]) / (j - i) for i, j in pairs) * (len(medians) - 1) if pairs else 0.0
    return Drift(slope / medians[0], max(abs(x / medians[0] - 1) for x in medians))


def drifted(part: str, used: list[Usage], judged: str) -> list[str]:
    """Prints how what is used has changed since the warm-up, and says what of it is too much: of memory by the one judged.

    What is allocated shows small leaks, which the pages that malloc keeps would hide.
    """
    warm = used[int(len(used) * WARM_UP) :]
    found: dict[str, Drift] = {name: drift([getattr(x, name) for x in warm]) for name in Usage._fields}
    for name, change in found.items():
        size = getattr(warm[-1], name)
        print(f"{part}: {name} {f'{size >> 20} MiB' if size > 1 << 20 else size}: {change}", flush=True)
    most = {judged: MOST_DRIFT, "allocated": MOST_ALLOCATED, "files": 0.0, "threads": 0.0}
    return [f"{part}: {name} drifts: {found[name]}" for name, share in most.items() if found[name].deviation > share]


def reported(outcome: Outcome, failures: list[str]) -> Outcome:
    for failure in failures:
        print(failure, flush=True)
    return outcome
