"""The cases of `python -m tests.reliability.huge`, with few elements, and that each op has one and each finds what it looks for."""

import subprocess
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from reliability import huge
from reliability.huge_cases import CASES, Case
from reliability.outcome import outcomes
from tolerance import WITHOUT_CPU_KERNEL
from torch import Tensor

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


def test_a_sum_that_ends_too_early_is_found() -> None:
    """A weight's gradient without the last of many repetitions, which is too little of it to show beside the others."""

    class Early(torch.autograd.Function):
        @staticmethod
        def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight: Tensor, count: int) -> Tensor:
            ctx.save_for_backward(x, weight)
            ctx.count = count
            return x * weight

        @staticmethod
        def backward(ctx: torch.autograd.function.FunctionCtx, dout: Tensor) -> tuple[Tensor, Tensor, None]:
            x, weight = ctx.saved_tensors
            seen = len(x) if ctx.count == 1 else len(x) // ctx.count * (ctx.count - 1)
            return dout * weight, (dout * x)[:seen].double().sum(0).to(weight.dtype), None

    def call(count: int) -> Callable[..., Tensor]:
        return lambda x, weight: Early.apply(x, weight, count)

    x, weight = torch.randn(2, 64, 16).bfloat16()
    found = huge.wrong(Case([x], call, [weight[0]]), count=600)
    assert [text.partition(" is ")[0] for text in found] == ["gradient of shared 0 by the last repetition"]


def test_the_last_repetition_lies_beyond() -> None:
    case = Case([torch.zeros(3, 5)], lambda count: lambda x: x)
    assert [case.count(elements) for elements in (29, 30, 31)] == [3, 3, 4]  # from element 30, 30 and 45 on


@pytest.mark.parametrize(
    ("printed", "status", "failed"),
    [("a: 1 cases, 0 failed, longest 2.0 s, at most 3 MiB\n", 0, 0), ("a: 1 cases, 0 failed\n", -11, 1), ("Killed\n", -9, 1)],
)
def test_a_case_is_counted_once(printed: str, status: int, failed: int, capsys: pytest.CaptureFixture) -> None:
    """By what the check returns, and never as right if its process ends badly."""
    done = subprocess.CompletedProcess([], status, printed, "")
    with mock.patch.object(subprocess, "run", return_value=done):
        outcome = huge.run_apart("bias_gelu", 1)
    assert (outcome.cases, outcome.failed) == (1, failed)
    shown = capsys.readouterr().out
    assert outcomes(shown) == []
    assert f"status {status}" in shown
    assert outcomes(str(outcome)) == [outcome]
