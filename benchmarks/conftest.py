"""How rows are measured, and what the JSON keeps of them.

A machine's speed drifts by more than the differences of interest, so every peer alternates with our op: before each timed round of
the peer, our op runs once and is timed the same way. The row's `speedup` is the median over the rounds of the peer's time divided
by ours just before it; comparisons come from there and not from rows measured at different moments.

On a GPU a call is timed by events on its stream. Before the first one the caches are flushed and the GPU is kept busy for as long
as the host takes to launch the call, so that the time is the GPU's alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.race import DEVICE, ON_GPU, OURS, Race
from sora_kernels import backends

SECONDS = 0.3 if ON_GPU else 1.2  # per row
ROUNDS = (10, 50) if ON_GPU else (3, 15)  # at least, at most
FLUSHED_BYTES, BUSY_CYCLES = 256 << 20, 2_000_000  # several caches; about a millisecond

_skipped: list[dict[str, str]] = []
_race: dict[tuple, Race] = {}


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
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flushed.zero_()
        torch.cuda._sleep(BUSY_CYCLES)
        start.record()
        race.call(name)
        end.record()
        end.synchronize()
        self.gpu_seconds += start.elapsed_time(end) * 1e-3

    def timed(self, race: Race, name: str) -> float:
        start = self()
        self.once(race, name)
        return self() - start


CLOCK = Clock()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))


@pytest.fixture
def measure(benchmark: BenchmarkFixture) -> Callable[..., None]:
    """measure(name, workload, *args, **kwargs) checks and measures one implementation of the race `workload(*args, **kwargs)`."""

    def run(name: str, workload: Callable[..., Race], *args: Any, **kwargs: Any) -> None:
        key = workload, args, tuple(kwargs.items())
        if key not in _race:  # one at a time: the rows of a race follow each other
            _race.clear()
            torch.compiler.reset()
            _race[key] = workload(*args, **kwargs)
        race = _race[key]
        benchmark.group = f"{race.op}, {row(race)['dtype']}, {row(race)['pass']}"
        try:
            race.check(name)
        except NotImplementedError as error:  # a peer that torch has not written for this; ours must run
            if name == OURS:
                raise
            skip(race, name, next(line for line in str(error).splitlines() if line.strip()))
        ours: list[float] = []
        setup = None if name == OURS else lambda: ours.append(CLOCK.timed(race, OURS))
        CLOCK.timed(race, name)  # once more before rounds are counted, compiled and warm
        seconds = CLOCK.timed(race, name) + (0 if name == OURS else CLOCK.timed(race, OURS))
        rounds = min(max(int(SECONDS / seconds), ROUNDS[0]), ROUNDS[1])
        benchmark.pedantic(CLOCK.once, args=(race, name), setup=setup, rounds=rounds)
        if benchmark.disabled:
            return
        times = benchmark.stats.stats.data
        benchmark.extra_info.update(row(race), implementation=name, **{f"useful_{race.unit}": race.work / statistics.median(times)})
        if name == OURS:
            with backends.record() as calls:
                race.call(name)
            benchmark.extra_info["backends"] = sorted({backend for _, backend in calls})
        if ours:
            benchmark.extra_info["speedup"] = statistics.median(peer / our for peer, our in zip(times, ours, strict=True))

    return run


def skip(race: Race, name: str, reason: str) -> None:
    _skipped.append({**row(race), "implementation": name, "reason": reason})
    pytest.skip(reason)


def row(race: Race) -> dict[str, str]:
    return {
        "op": race.op,
        "dtype": str(race.dtype).removeprefix("torch."),
        "pass": "forward+backward" if race.backward else "forward",
    }


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict) -> None:
    output_json["skipped"] = _skipped
    output_json["machine_info"]["torch"] = torch.__version__
    if ON_GPU:
        output_json["machine_info"]["device"] = torch.cuda.get_device_name()
    else:
        isa, threads = backends.BACKENDS["cpu"].load().isa(), torch.get_num_threads()
        output_json["machine_info"]["device"] = f"{threads} threads, kernels for {isa}"
