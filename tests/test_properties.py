"""The properties of tests/reliability on some random batches of every op, and whether they can fail."""

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reliability import properties
from reliability.layouts import dtypes_of
from reliability.outcome import Outcome, outcomes
from reliability.properties import OPS, PROPERTIES, SETTINGS, Pair, check_once, examine, pairs
from reliability.subject import Op, Sample, Subject
from sweep import ROOT
from tolerance import EMULATED
from torch import Tensor

import sora_kernels
from sora_kernels import backends
from sora_kernels.signatures import SIGNATURES

# Besides the smallest one, which hypothesis begins with.
EXAMPLES = {"cpu": 17, "reference": 3, "triton": 1, "simt": 1}
# Each op on each backend that has its function.
CASES = [
    pytest.param(name, backend, marks=[pytest.mark.emulated] * (backend in EMULATED))
    for backend in EXAMPLES
    if backend in backends.BACKENDS
    for name, op in OPS.items()
    if dtypes_of(op.function, backend)
]


def test_every_public_op_has_properties() -> None:
    """An op is what takes a tensor, or videos, first."""
    public = {name: getattr(sora_kernels, name) for name in sora_kernels.__all__}
    functions = {name: f for name, f in public.items() if inspect.isfunction(f) and inspect.signature(f).parameters}
    first = {name: str(next(iter(inspect.signature(f).parameters.values())).annotation) for name, f in functions.items()}
    assert {name for name, annotation in first.items() if re.search("Tensor|Videos", annotation)} == set(OPS)


def test_every_backend_function_runs() -> None:
    """By the properties of some op."""
    ran = set()
    for name in OPS:
        examined = examine(Pair(name, "permuted"), "reference", 3)
        assert examined.failure is None, examined.failure
        ran |= examined.functions
    assert ran == set(SIGNATURES)


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_properties(name: str, backend: str) -> None:
    mine = [pair for pair in pairs(backend) if pair.op == name]

    @settings(SETTINGS, max_examples=EXAMPLES[backend] + 1, derandomize=True)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        check_once(data.draw(st.sampled_from(mine), label="property"), backend, data)

    check()


@pytest.mark.parametrize("name", OPS)
def test_few_batches_are_empty(name: str) -> None:
    counts = {"accuracy": [], "packed": []}  # samples with tokens

    @settings(SETTINGS, max_examples=20, derandomize=True)
    @given(data=st.data())
    def draw(data: st.DataObject) -> None:
        for check, found in counts.items():
            subject = data.draw(OPS[name].draw(Pair(name, check).setting("reference")))
            found.append(sum(sample.has_tokens for sample in subject.samples))

    draw()
    assert sum(n >= 1 for n in counts["accuracy"]) >= 15
    assert sum(n >= 2 for n in counts["packed"]) >= 12


def changed(name: str, change: Callable[[Subject], Subject]) -> Op:
    op = OPS[name]
    return op._replace(draw=lambda setting: op.draw(setting).map(change))


def broken(kind: str, subject: Subject) -> Subject:
    """The same op with a fault that one property is for."""

    def call(layouts: list, columns: list, shared: list) -> list:
        (x,) = subject.call(layouts, columns, shared)
        if kind in ("packed", "blank"):
            return [x * (1 + len(layouts))]
        if kind == "permuted":
            return [torch.cat([x[:1] * 2, x[1:]])]
        if kind == "slack":
            return [x + 1]
        if kind == "poisoned":
            return [x + 0 * columns[0].sum()]
        if kind == "nans":
            first = columns[0].flatten()[:1]
            usual = torch.full_like(first, torch.nan).view(torch.uint8)
            return [x if torch.equal(first.view(torch.uint8), usual) else x.nan_to_num()]
        if kind == "threaded":
            return [x * torch.get_num_threads()]
        if kind == "strided":
            return [x * (1 + columns[0].is_contiguous())]
        return [x * 1.001]

    return replace(subject, call=call)


@pytest.mark.parametrize("kind", PROPERTIES)
def test_a_fault_is_found_and_can_be_repeated(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong = OPS["rope_3d"], changed("rope_3d", partial(broken, kind))
    pair = Pair("rope_3d", kind)
    monkeypatch.setitem(properties.OPS, "rope_3d", wrong)
    failure = examine(pair, "cpu", 60).failure
    assert failure is not None
    assert f"--only rope_3d {kind} --blob " in failure
    assert "'interleaved'" not in failure  # a case is told in one line
    assert "interleaved=" in failure
    blob = failure.split("--blob ")[1].strip()
    assert examine(pair, "cpu", 1, blob=blob).failure is not None
    monkeypatch.setitem(properties.OPS, "rope_3d", right)
    assert examine(pair, "cpu", 1, blob=blob).failure is None


def failure(name: str, check: str, change: Callable[[Subject], Subject], backend: str = "cpu") -> str:
    with mock.patch.dict(properties.OPS, {name: changed(name, change)}):
        return examine(Pair(name, check), backend, 20).failure or ""


def test_an_op_that_skips_its_kernel_is_found() -> None:
    def forward_too(subject: Subject) -> Subject:
        return replace(subject, call=subject.plain)

    def backward(subject: Subject) -> Subject:
        def call(*given: list) -> list[Tensor]:
            outputs = zip(subject.call(*given), subject.plain(*given), strict=True)
            return [plain + (out - plain).detach() for out, plain in outputs]

        return replace(subject, call=call)

    assert "expected bias_gelu_backward, bias_gelu_forward of cpu to run" in failure("bias_gelu", "packed", forward_too)
    assert "expected bias_gelu_backward, bias_gelu_forward of cpu to run" in failure("bias_gelu", "packed", backward)


@pytest.mark.parametrize("check", ["packed", "permuted"])
def test_gradients_of_another_sample_are_found(check: str) -> None:
    """Of samples of one size."""

    class Swapped(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, dout: Tensor) -> Tensor:
            return dout.roll(4, 0)

    def call(_: list, columns: list[Tensor], __: list) -> list[Tensor]:
        return [Swapped.apply(columns[0])]

    samples = [Sample(4, [torch.randn(4, 3)]) for _ in range(3)]
    subject = Subject({}, ("x",), samples, [], call, call, call, lambda n: n).numbered()

    @settings(SETTINGS, max_examples=10, derandomize=True)
    @given(data=st.data())
    def holds(data: st.DataObject) -> None:
        PROPERTIES[check](data, subject)

    with pytest.raises(AssertionError):
        holds()


def test_strides_of_a_fused_projection_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "flash_attn_varlen_qkvpacked_func"
    right = getattr(sora_kernels, name)

    def wrong(qkv: Tensor, *given: Any, **named: Any) -> Any:
        result = right(qkv, *given, **named)
        return result if qkv.is_contiguous() else (result[0] * 2, *result[1:]) if isinstance(result, tuple) else result * 2

    assert examine(Pair(name, "strided"), "cpu", 20).failure is None
    monkeypatch.setattr(sora_kernels, name, wrong)
    assert examine(Pair(name, "strided"), "cpu", 20).failure is not None


def test_nothing_is_near_a_plain_that_is_none() -> None:
    """Where plain PyTorch's result is NaN, not everything is right."""

    def without_plain(subject: Subject) -> Subject:
        return replace(subject, plain=lambda *given: [x * torch.nan for x in subject.plain(*given)])

    assert "exceeds" in failure("flash_attn_with_kvcache", "accuracy", without_plain)
    assert "exceeds" in failure("int8_attention", "accuracy", without_plain, "reference")


@settings(SETTINGS, max_examples=20, derandomize=True)
@given(data=st.data())
def test_zeros_are_not_near(data: st.DataObject) -> None:
    """int8_attention, whose results are only near those of attention."""
    subject = data.draw(OPS["int8_attention"].draw(Pair("int8_attention", "accuracy").setting("reference")))
    properties.accuracy(data, subject)
    right = subject.call(subject.layouts, subject.arguments([sample.tensors for sample in subject.samples]), [])
    if right[0].any():  # all keys may be hidden
        with pytest.raises(AssertionError, match="exceeds"):
            properties.check_rule(replace(subject, call=lambda *_: [0 * x for x in right]))


def test_the_reference_runs_what_the_cpu_has_not() -> None:
    command = [sys.executable, "-m", "tests.reliability.properties", "4", "--only", "int8_attention", "permuted"]
    environment = {name: value for name, value in os.environ.items() if name != "SORA_KERNELS_ISA"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert outcomes(done.stdout) == [Outcome("permuted", 4, 0)]


def test_program() -> None:
    command = [sys.executable, "-m", "tests.reliability.properties", "5", "--only", "bias_gelu", "packed"]
    environment = {**os.environ, "SORA_KERNELS_ISA": "baseline"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (outcome,) = outcomes(done.stdout)
    assert (outcome.name, outcome.cases, outcome.failed) == ("packed", 5, 0)
    for only, complaint in ((["nothing", "packed"], "an op of "), (["bias_gelu", "slack"], "what cpu has, got bias_gelu slack")):
        done = subprocess.run([*command[:5], *only], cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith(f"properties.py: error: --only: expected {complaint}")
