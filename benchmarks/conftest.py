"""How rows are measured, and what the JSON keeps of them.

A machine's speed drifts by more than the differences of interest, so every peer alternates with our op: before each timed round of
the peer, our op runs once and is timed the same way. The row's `speedup` is the median over the rounds of the peer's time divided
by ours just before it; comparisons come from there and not from rows measured at different moments.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.workloads import OURS, Race
from sora_kernels import _cpu

SECONDS = 1.2  # per row
ROUNDS = 3, 15  # at least, at most

_skipped: list[dict[str, str]] = []
_race: dict[tuple, Race] = {}


def once(race: Race, name: str) -> None:
    """What is timed: one call, and giving its results' memory back."""
    race.call(name)


def timed(race: Race, name: str) -> float:
    start = time.perf_counter()
    once(race, name)
    return time.perf_counter() - start


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
        except NotImplementedError as error:  # a peer that torch has not written; ours must run
            if name == OURS:
                raise
            reason = next(line for line in str(error).splitlines() if line.strip())
            _skipped.append({**row(race), "implementation": name, "reason": reason})
            pytest.skip(reason)
        ours: list[float] = []
        setup = None if name == OURS else lambda: ours.append(timed(race, OURS))
        seconds = timed(race, name) + (0 if name == OURS else timed(race, OURS))
        rounds = min(max(int(SECONDS / seconds), ROUNDS[0]), ROUNDS[1])
        benchmark.pedantic(once, args=(race, name), setup=setup, rounds=rounds)
        if benchmark.disabled:
            return
        times = benchmark.stats.stats.data
        benchmark.extra_info.update(
            row(race),
            implementation=name,
            threads=torch.get_num_threads(),
            isa=_cpu.isa(),
            **{f"useful_{race.unit}": race.work / statistics.median(times)},
        )
        if ours:
            benchmark.extra_info["speedup"] = statistics.median(peer / our for peer, our in zip(times, ours, strict=True))

    return run


def row(race: Race) -> dict[str, str]:
    return {
        "op": race.op,
        "dtype": str(race.dtype).removeprefix("torch."),
        "pass": "forward+backward" if race.backward else "forward",
    }


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict) -> None:
    output_json["skipped"] = _skipped
    output_json["machine_info"]["torch"] = torch.__version__
