"""How a row of a race is measured, and what is kept of it; for pytest-benchmark (conftest.py) and for `benchmarks.gpu`.

A machine's speed drifts by more than the differences of interest, so every peer alternates with our op: before each timed round of
the peer, our op runs once and is timed the same way. The row's `speedup` is the median over the rounds of the peer's time divided
by ours just before it; comparisons come from there and not from rows measured at different moments.

On a GPU a call is timed by events on its stream. Before the first one the caches are flushed and the GPU sleeps for longer than the
host takes to launch the call, so that the time is the GPU's alone; what the host takes is `host_ms`, and a row says so if that is
the longer of the two.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config

from benchmarks.cells import percentiles
from benchmarks.race import BACKWARD, DEVICE, ON_GPU, OURS, REHEARSED, Race
from sora_kernels import backends

SECONDS = 0.3 if ON_GPU else 1.2  # per row
ROUNDS = (10, 50) if ON_GPU else (3, 15)  # at least, at most
FLUSHED_BYTES = 256 << 20  # several caches
if REHEARSED:
    SECONDS, ROUNDS, FLUSHED_BYTES = 0.0, (2, 2), 1 << 10
# How long the GPU sleeps, in times of the host's launch and at most in seconds; no GPU's clock is much faster than this, in Hz.
ASLEEP, LONGEST, CLOCK_RATE = 1.5, 0.05, 2e9

# The reference of a float32 row is float32 throughout; TF32, which convolutions take by default, is off by more than is allowed.
torch.backends.cudnn.allow_tf32 = False


class Clock:
    """Seconds, of the host or of the GPU: calling it reads it, `time` passes a function's time on it."""

    def __init__(self) -> None:
        self.gpu_seconds = 0.0
        self.flushed = torch.empty(FLUSHED_BYTES if ON_GPU else 0, dtype=torch.uint8, device=DEVICE)

    def __call__(self) -> float:
        return self.gpu_seconds if ON_GPU else time.perf_counter()

    def once(self, race: Race, name: str) -> None:
        """What is timed: one call, and giving its results' memory back."""
        if not ON_GPU:
            race.call(name)
            return
        if name not in race.host_seconds:
            race.host_seconds[name] = host_seconds(lambda: race.call(name))
        self.gpu_seconds += self.on_gpu(lambda: race.call(name), race.host_seconds[name])

    def on_gpu(self, function: Callable[[], Any], host_seconds: float) -> float:
        """The GPU's seconds for one call, which takes the host as long to launch."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flushed.zero_()
        torch.cuda._sleep(int(min(ASLEEP * host_seconds, LONGEST) * CLOCK_RATE))
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    def timed(self, race: Race, name: str) -> float:
        start = self()
        self.once(race, name)
        return self() - start


CLOCK = Clock()


def host_seconds(function: Callable[[], Any]) -> float:
    """The host's seconds for one call, which does not wait for the GPU: the median of a few."""
    seconds = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


class NotSupported(Exception):
    """A peer that torch has not written for this."""


def checked(race: Race, name: str) -> dict[str, Any]:
    """Checks an implementation and returns its row, with the error in it if a peer is inexact; all of ours must be right."""
    info = row(race, name)
    # A compiled backward that gives away what the forward kept could not differentiate the same graph again.
    torch._functorch.config.donated_buffer = race.which != BACKWARD
    try:
        race.check(name)
    except NotImplementedError as error:
        if name.startswith(OURS):
            raise
        raise NotSupported(next(line for line in str(error).splitlines() if line.strip())[:200]) from error
    except ArithmeticError as error:
        if name.startswith(OURS):
            raise
        info["inexact"] = str(error)
    return info


def row(race: Race, name: str) -> dict[str, Any]:
    return {"op": race.op, "dtype": str(race.dtype).removeprefix("torch."), "pass": race.which, "implementation": name}


def warm(race: Race, name: str) -> int:
    """Runs it and ours, compiled and warm after that, and says how many rounds to measure."""
    CLOCK.timed(race, name)
    seconds = CLOCK.timed(race, name) + (0 if name == OURS else CLOCK.timed(race, OURS))
    return min(max(int(SECONDS / max(seconds, 1e-9)), ROUNDS[0]), ROUNDS[1])


def figures(race: Race, name: str, times: list[float], ours: list[float]) -> dict[str, Any]:
    """What a row keeps of its rounds: seconds of this implementation, and of ours just before each."""
    median = statistics.median(times)
    info: dict[str, Any] = {f"useful_{unit}": work / median for unit, work in race.work.items()}
    if ON_GPU:
        info |= {"host_ms": 1e3 * race.host_seconds[name], "host_bound": race.host_seconds[name] > median}
    if name == OURS:
        with backends.record() as calls:
            race.call(name)
        info["backends"] = sorted({backend for _, backend in calls})
    if ours:
        info["speedup"] = statistics.median(peer / our for peer, our in zip(times, ours, strict=True))
    return info


def measured(race: Race, name: str) -> dict[str, Any]:
    """A row, checked and measured: `row`, `figures` and `ms`, the times at 20%, 50% and 80%."""
    info = checked(race, name)
    times, ours = [], []
    for _ in range(warm(race, name)):
        if name != OURS:
            ours.append(CLOCK.timed(race, OURS))
        times.append(CLOCK.timed(race, name))
    return info | figures(race, name, times, ours) | {"ms": percentiles(times)}
