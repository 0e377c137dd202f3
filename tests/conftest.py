"""Fixtures: what a test runs on, and the proof that it ran there."""

from collections.abc import Iterator

import pytest
import torch
from tolerance import DTYPES, Target

from sora_kernels import backends


def targets(function: str, dtypes: tuple[torch.dtype, ...]) -> list[Target]:
    """Everything that can run `function` here."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return [
        Target(device, name, dtype)
        for device in devices
        for dtype in dtypes
        for name, reason in backends.candidates(function, device, dtype)
        if reason is None
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`target` runs over every backend and dtype, `target32` over every backend in float32, `make_case` over OPS."""
    for fixture, dtypes in (("target", DTYPES), ("target32", (torch.float32,))):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, targets(metafunc.module.FUNCTION, dtypes), indirect=True, ids=str)
    if "make_case" in metafunc.fixturenames:
        cases = metafunc.module.OPS
        metafunc.parametrize("make_case", cases.values(), ids=cases.keys())


def forced(target: Target) -> Iterator[Target]:
    """Runs a test on its backend alone, and fails it if anything of it ran on another or nothing ran at all."""
    torch.manual_seed(0)
    with backends.use_backend(target.backend), backends.record() as calls:
        yield target
    assert {name for _, name in calls} == {target.backend}, f"expected {target.backend} to run, recorded {calls}"


@pytest.fixture
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    yield from forced(request.param)


@pytest.fixture
def target32(request: pytest.FixtureRequest) -> Iterator[Target]:
    yield from forced(request.param)
