"""How rows are measured, and what the JSON keeps of them.

A machine's speed drifts by more than the differences of interest, so every peer alternates with our op: before each timed round of
the peer, our op runs once and is timed the same way. The row's `speedup` is the median over the rounds of the peer's time divided
by ours just before it; comparisons come from there and not from rows measured at different moments.

On a GPU a call is timed by events on its stream. Before the first one the caches are flushed and the GPU sleeps for longer than the
host takes to launch the call, so that the time is the GPU's alone; what the host takes is `host_ms`, and a row says so if that is
the longer of the two.

--results FILE rewrites FILE, as --benchmark-json would write it, whenever a row is done: however a run ends, what it measured is
there.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._functorch.config
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.race import BACKWARD, BOTH, DEVICE, ON_GPU, OURS, Race
from sora_kernels import backends

SECONDS = 0.3 if ON_GPU else 1.2  # per row
ROUNDS = (10, 50) if ON_GPU else (3, 15)  # at least, at most
FLUSHED_BYTES = 256 << 20  # several caches
# How long the GPU sleeps, in times of the host's launch and at most in seconds; no GPU's clock is much faster than this, in Hz.
ASLEEP, LONGEST, CLOCK_RATE = 1.5, 0.05, 2e9

# The reference of a float32 row is float32 throughout; TF32, which convolutions take by default, is off by more than is allowed.
torch.backends.cudnn.allow_tf32 = False

_rows: list[dict[str, Any]] = []
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
        if name not in race.host_seconds:
            race.host_seconds[name] = self.launch(race, name)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flushed.zero_()
        torch.cuda._sleep(int(min(ASLEEP * race.host_seconds[name], LONGEST) * CLOCK_RATE))
        start.record()
        race.call(name)
        end.record()
        end.synchronize()
        self.gpu_seconds += start.elapsed_time(end) * 1e-3

    def launch(self, race: Race, name: str) -> float:
        """The host's seconds for one call, which does not wait for the GPU: the median of a few."""
        seconds = []
        for _ in range(5):
            torch.cuda.synchronize()
            start = time.perf_counter()
            race.call(name)
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)

    def timed(self, race: Race, name: str) -> float:
        start = self()
        self.once(race, name)
        return self() - start


CLOCK = Clock()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, metavar="FILE", help="rewrite this JSON file whenever a row is done")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))
    if ON_GPU and all("measure" in getattr(item, "fixturenames", ()) for item in items):
        items.sort(key=turn)


def turn(item: Any) -> int:
    """What a GPU measures first, should time run out: the attention and the shares of copy bandwidth that there are targets for."""
    function, params = item.originalname, item.callspec.params
    name = params["implementation"]
    if "flex" in name or function in ("test_window_attention", "test_training_step"):
        return 4
    if params["which"] == BOTH:
        return 3
    if "attention" in function:
        return 0 if params.get("batch") in ("16k", "mixed, 16 of each") else 3
    return {OURS: 1, "copy": 1, "torch.compile": 2}.get(name, 3)


@pytest.fixture
def measure(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Callable[..., None]:
    """measure(name, workload, *args, **kwargs) checks and measures one implementation of the race `workload(*args, **kwargs)`."""

    def run(name: str, workload: Callable[..., Race], *args: Any, **kwargs: Any) -> None:
        key = workload, args, tuple(kwargs.items())
        if key not in _race:  # one at a time: the rows of a race follow each other
            _race.clear()
            torch.compiler.reset()
            _race[key] = workload(*args, **kwargs)
        race = _race[key]
        # A compiled backward that gives away what the forward kept could not differentiate the same graph again.
        torch._functorch.config.donated_buffer = race.which != BACKWARD
        benchmark.group = ", ".join(row(race, name)[key] for key in ("op", "dtype", "pass"))
        info = checked(race, name, request.config)
        ours: list[float] = []
        setup = None if name == OURS else lambda: ours.append(CLOCK.timed(race, OURS))
        CLOCK.timed(race, name)  # once more before rounds are counted, compiled and warm
        seconds = CLOCK.timed(race, name) + (0 if name == OURS else CLOCK.timed(race, OURS))
        rounds = min(max(int(SECONDS / seconds), ROUNDS[0]), ROUNDS[1])
        try:
            benchmark.pedantic(CLOCK.once, args=(race, name), setup=setup, rounds=rounds)
        except KeyboardInterrupt:  # pytest-benchmark would count a row without a time as measured, and die of it
            benchmark.has_error = True
            raise
        if benchmark.disabled:
            return
        times = benchmark.stats.stats.data
        median = statistics.median(times)
        info |= {f"useful_{unit}": work / median for unit, work in race.work.items()}
        if ON_GPU:
            info |= {"host_ms": 1e3 * race.host_seconds[name], "host_bound": race.host_seconds[name] > median}
        if name == OURS:
            with backends.record() as calls:
                race.call(name)
            info["backends"] = sorted({backend for _, backend in calls})
        if ours:
            info["speedup"] = statistics.median(peer / our for peer, our in zip(times, ours, strict=True))
        benchmark.extra_info.update(info)
        _rows.append({"fullname": request.node.nodeid, "extra_info": info, "stats": {"data": times}})
        save(request.config)

    return run


def checked(race: Race, name: str, config: pytest.Config) -> dict[str, Any]:
    """Checks an implementation and returns its row, with the error in it if a peer is inexact; ours must run and be right."""
    info = row(race, name)
    try:
        race.check(name)
    except NotImplementedError as error:  # a peer that torch has not written for this
        if name == OURS:
            raise
        reason = next(line for line in str(error).splitlines() if line.strip())[:200]
        _skipped.append({**info, "reason": reason})
        save(config)
        pytest.skip(reason)
    except ArithmeticError as error:
        if name == OURS:
            raise
        info["inexact"] = str(error)
    return info


def row(race: Race, name: str) -> dict[str, Any]:
    return {"op": race.op, "dtype": str(race.dtype).removeprefix("torch."), "pass": race.which, "implementation": name}


@cache
def machine(config: pytest.Config) -> dict[str, Any]:
    """As pytest-benchmark describes it."""
    info = config.hook.pytest_benchmark_generate_machine_info(config=config)
    config.hook.pytest_benchmark_update_machine_info(config=config, machine_info=info)
    return info


def save(config: pytest.Config) -> None:
    """Writes all rows so far to the file of --results, which is whole at any moment."""
    path = config.getoption("results")
    if path is None:
        return
    now = datetime.now(timezone.utc).isoformat()
    results = {"machine_info": machine(config), "datetime": now, "benchmarks": _rows, "skipped": _skipped}
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results))
    part.replace(path)


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["torch"] = torch.__version__
    if ON_GPU:
        machine_info["device"] = torch.cuda.get_device_name()
    else:
        isa, threads = backends.BACKENDS["cpu"].load().isa(), torch.get_num_threads()
        machine_info["device"] = f"{threads} threads, kernels for {isa}"


def pytest_benchmark_update_json(output_json: dict) -> None:
    output_json["skipped"] = _skipped
