"""The declaration of signatures.py is what every backend takes and every op passes."""

import inspect
import re
from typing import Any
from unittest import mock

import pytest
import torch
from reliability import entries
from tolerance import WITHOUT_CPU_KERNEL
from torch import Tensor

from sora_kernels import backends, int8_attention
from sora_kernels.signatures import SIGNATURES, parse


def test_a_declaration() -> None:
    name, signature = parse("rotate(x, weight?, eps) -> out, dweight?")
    assert name == "rotate"
    assert signature.arguments == ("x", "weight", "eps", "out", "dweight")
    assert (len(signature.inputs), signature.optional) == (3, {"weight", "dweight"})
    with pytest.raises(ValueError, match=r"expected 'function\(inputs\) -> outputs', got 'rotate\(x\)'"):
        parse("rotate(x)")


@pytest.mark.parametrize("function", SIGNATURES)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_written_in_python(backend: str, function: str) -> None:
    parameters = inspect.signature(getattr(backends.BACKENDS[backend].load(), function)).parameters
    assert tuple(parameters) == SIGNATURES[function].arguments


@pytest.mark.parametrize("function", SIGNATURES)
@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_compiled(backend: str, function: str) -> None:
    """Where a compiled module has a function, its own text declares the same."""
    try:
        compiled = getattr(backends.BACKENDS[backend].load(), function, None)
    except ImportError as error:
        pytest.skip(str(error))
    if compiled is None:
        assert backend == "cuda" or function in WITHOUT_CPU_KERNEL
        return
    (text,) = re.findall(rf"^{function}\(.*\) -> [\w?, ]+$", compiled.__doc__, re.MULTILINE)[-1:]
    assert parse(text) == (function, SIGNATURES[function]._replace(hints=()))  # which it has no use for


def test_ops_pass_what_is_declared() -> None:
    """Every argument by its name and in its place, and None only where it may be."""
    call, seen = backends.call, set()

    def checked(function: str, like: Tensor, **arguments: Any) -> None:
        declared = SIGNATURES[function]
        assert tuple(arguments) == (*declared.inputs, *declared.hints, *declared.outputs)
        assert {name for name, value in arguments.items() if value is None} <= {*declared.optional, *declared.hints}
        seen.add(function)
        call(function, like, **arguments)

    with mock.patch.object(backends, "call", checked):
        entries.workload(torch.float32)
        int8_attention(*torch.randn(3, 1, 4, 1, 8))  # which a backend that is forced to be the CPU's lacks
    assert seen == set(SIGNATURES)
