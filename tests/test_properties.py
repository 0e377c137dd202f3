"""The properties of tests/reliability on some random batches of every op, and whether they can fail."""

import inspect
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reliability import properties
from reliability.layouts import dtypes_of
from reliability.outcome import outcomes
from reliability.properties import OPS, PROPERTIES, SETTINGS, Pair, check_once, examine, pairs
from reliability.subject import Op, Subject
from sweep import ROOT
from tolerance import EMULATED

import sora_kernels
from sora_kernels import backends
from sora_kernels.signatures import SIGNATURES

EXAMPLES = {"cpu": 18, "reference": 3, "triton": 2, "simt": 2}
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

    @settings(SETTINGS, max_examples=EXAMPLES[backend], derandomize=True)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        check_once(data.draw(st.sampled_from(mine), label="property"), backend, data)

    check()


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
    right = OPS["rope_3d"]
    wrong = Op(lambda setting: right.draw(setting).map(lambda subject: broken(kind, subject)), right.function)
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


def test_program() -> None:
    command = [sys.executable, "-m", "tests.reliability.properties", "5", "--only", "bias_gelu", "packed"]
    environment = {**os.environ, "SORA_KERNELS_ISA": "baseline"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (outcome,) = outcomes(done.stdout)
    assert (outcome.name, outcome.cases, outcome.failed) == ("packed on baseline", 5, 0)
    command[5] = "nothing"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("properties.py: error: --only: expected an op of ")
