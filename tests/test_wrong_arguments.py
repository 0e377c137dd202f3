"""Whatever is passed to whatever public function: the complaint names the op and the argument, what was expected and what came."""

import inspect
from typing import Any

import pytest
import torch
from reliability.right_arguments import FUNCTIONS, IGNORED, call, right


class Wrong:
    """An object of no use."""

    def __repr__(self) -> str:
        return "Wrong()"


def wrong_values() -> dict[str, Any]:
    return {
        "object": Wrong(),
        "text": "wrong",
        "complex": 1j,
        "list of objects": [Wrong()],
        "sparse": torch.eye(4).to_sparse(),
        "nested": torch.nested.nested_tensor([torch.zeros(2, 4)], layout=torch.jagged),
        "int64": torch.zeros(2, 2, dtype=torch.int64),
        "infinity": float("inf"),
    }


ARGUMENTS = [
    (name, argument)
    for name, function in FUNCTIONS.items()
    for argument in inspect.signature(function).parameters
    if argument not in IGNORED
]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_right_is_taken(name: str) -> None:
    call(name, right(name))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", wrong_values())
@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_what_is_wrong_is_named(name: str, argument: str, kind: str) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"^{name}: \S*{argument}\S*: expected .+, got .+"):
        call(name, {**right(name), argument: wrong_values()[kind]})


@pytest.mark.parametrize("name", ["flash_attn_kvpacked_func", "flash_attn_varlen_kvpacked_func"])
def test_what_a_packed_projection_holds_is_named_after_it(name: str) -> None:
    arguments = right(name)
    with pytest.raises(TypeError, match=rf"^{name}: kv: expected dtype float32, got float64"):
        call(name, {**arguments, "kv": arguments["kv"].double()})
