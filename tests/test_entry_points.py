"""Entry points of the compiled modules take their arguments by the names of their signatures."""

import re
from typing import Any

import pytest
import torch
from reliability import entries
from reliability.mutations import copied
from torch import Tensor

from sora_kernels import backends


@pytest.fixture(scope="module")
def cpu() -> Any:
    return backends.BACKENDS["cpu"].load()


@pytest.fixture(scope="module")
def recorded(cpu) -> dict[str, list[tuple]]:
    """Arguments of every entry, whose outputs are filled."""
    torch.manual_seed(0)
    calls = entries.recorded()
    return {name: calls[name] for name in cpu.signatures}


def names(text: str) -> list[tuple[str, bool, bool]]:
    """(name, None is allowed, it is an output) of each argument of a signature."""
    inputs, outputs = text.partition("(")[2].split(") -> ")
    return [
        (name, bool(optional), side is outputs) for side in (inputs, outputs) for name, optional in re.findall(r"(\w+)(\??)", side)
    ]


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [x for item in value for x in flat(item)] if isinstance(value, tuple | list) else []


def test_every_op_has_a_signature(cpu):
    assert set(cpu.signatures) == {name for name in backends.FUNCTIONS if hasattr(cpu, name)}
    for name, text in cpu.signatures.items():
        assert re.fullmatch(rf"{name}\((\w+\??(, )?)+\) -> (\w+\??(, )?)+", text), text
        assert text in getattr(cpu, name).__doc__


def test_modules_agree(cpu):
    cuda = pytest.importorskip("sora_kernels._cuda", exc_type=ImportError)
    assert cuda.signatures == {name: cpu.signatures[name] for name in cuda.signatures}
    x = torch.zeros(4, 8)
    with pytest.raises(ValueError, match=r"_cuda: bias_gelu_forward: x: expected a tensor on the device of sora_kernels\._cuda"):
        cuda.bias_gelu_forward(out=None, bias=None, x=x)


def test_keywords_in_any_order(cpu, recorded):
    for op, calls in recorded.items():
        arguments = names(cpu.signatures[op])
        for args in calls:
            keywords = {name: copied(value) for (name, _, _), value in zip(arguments, args, strict=True)}
            for name, _, is_output in arguments:
                for x in flat(keywords[name]) if is_output else ():
                    x.fill_(torch.nan)
            getattr(cpu, op)(**dict(reversed(keywords.items())))
            for (name, _, _), expected in zip(arguments, args, strict=True):
                for x, y in zip(flat(keywords[name]), flat(expected), strict=True):
                    assert torch.equal(x, y), f"{op}: {name}"


def test_none_is_taken_only_where_a_signature_says_so(cpu, recorded):
    for op, calls in recorded.items():
        arguments = names(cpu.signatures[op])
        keywords = {name: copied(value) for (name, _, _), value in zip(arguments, calls[0], strict=True)}
        for name, optional, _ in arguments:
            if optional:
                continue
            is_tensor = isinstance(keywords[name], Tensor)
            message = f"{op}: {name}: expected a tensor, got None" if is_tensor else "incompatible function arguments"
            with pytest.raises(ValueError if is_tensor else TypeError, match=message):
                getattr(cpu, op)(**keywords | {name: None})
