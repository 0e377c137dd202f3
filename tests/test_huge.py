"""The cases of `python -m tests.reliability.huge`, with few elements, and that each op has one and each finds what it looks for."""

from unittest import mock

import pytest
import torch
from reliability import huge
from reliability.huge_cases import CASES
from tolerance import WITHOUT_CPU_KERNEL

from benchmarks.works import works
from sora_kernels import backends
from sora_kernels.layout import PackedLayout

WITHOUT = {name.removesuffix("_forward") for name in WITHOUT_CPU_KERNEL}


def test_every_op_has_a_case() -> None:
    ops = {work.op.partition(",")[0] for work in works(torch.float32, 16, 32, layout=PackedLayout.from_grids([(1, 2, 2)]))}
    assert {name.partition(",")[0] for name in CASES} == ops - WITHOUT


def test_every_kernel_runs_in_a_case() -> None:
    with backends.record() as calls:
        for make in CASES.values():
            assert huge.wrong(make(), count=2) == []
    assert {name for name, backend in calls if backend == "cpu"} == set(backends.FUNCTIONS) - set(WITHOUT_CPU_KERNEL)


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_element_is_found(name: str) -> None:
    """The last one of the first output of each kernel, in the batch that repeats."""
    case, call, changed = CASES[name](), backends.call, set()

    def off(function: str, like: torch.Tensor, /, **arguments: object) -> None:
        call(function, like, **arguments)
        if backends.forced_backend() is None and function in changed:  # not of the small batch, which is the first
            outputs = [arguments[x] for x in backends.SIGNATURES[function].outputs]
            out = next(x for x in outputs if x is not None and (not isinstance(x, list) or x))
            (out[0] if isinstance(out, list) else out).view(-1)[-1] = 100
        changed.add(function)

    with mock.patch.object(backends, "call", off):
        assert huge.wrong(case, count=2)
