"""The rows of the benchmarks, under pytest-benchmark: each is checked, then measured as measure.py says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.measure import CLOCK, NotSupported, checked, figures, row, warm
from benchmarks.race import ON_GPU, OURS, Race
from sora_kernels import backends

_skipped: list[dict[str, str]] = []
_race: dict[tuple, Race] = {}


FAMILIES = sorted(path.stem for path in (Path(__file__).parent / "diffusers_models").glob("[a-z]*.py"))


def pytest_addoption(parser: pytest.Parser) -> None:
    text = f"families of diffusers' models to measure, about 4 minutes each on two cores: all, or of {', '.join(FAMILIES)}"
    parser.addoption("--families", default="wan", metavar="A,B", help=f"{text} (default: wan)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "family" in metafunc.fixturenames:
        given = metafunc.config.getoption("--families")
        families = FAMILIES if given == "all" else given.split(",")
        if unknown := [family for family in families if family not in FAMILIES]:
            raise pytest.UsageError(f"--families: expected all, or some of {', '.join(FAMILIES)}, got {', '.join(unknown)}")
        metafunc.parametrize("family", families)


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
        benchmark.group = ", ".join(row(race, name)[key] for key in ("op", "dtype", "pass"))
        try:
            info = checked(race, name)
        except NotSupported as error:
            _skipped.append({**row(race, name), "reason": str(error)})
            pytest.skip(str(error))
        ours: list[float] = []
        setup = None if name == OURS else lambda: ours.append(CLOCK.timed(race, OURS))
        try:
            benchmark.pedantic(CLOCK.once, args=(race, name), setup=setup, rounds=warm(race, name))
        except KeyboardInterrupt:  # pytest-benchmark would count a row without a time as measured, and die of it
            benchmark.has_error = True
            raise
        if not benchmark.disabled:
            benchmark.extra_info.update(info | figures(race, name, benchmark.stats.stats.data, ours))

    return run


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["torch"] = torch.__version__
    if ON_GPU:
        machine_info["device"] = torch.cuda.get_device_name()
    else:
        isa, threads = backends.BACKENDS["cpu"].load().isa(), torch.get_num_threads()
        machine_info["device"] = f"{threads} threads, kernels for {isa}"


def pytest_benchmark_update_json(output_json: dict) -> None:
    output_json["skipped"] = _skipped
