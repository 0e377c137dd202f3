"""A kept result is the one that a new computation would give, and nothing outlives its tensors."""

import copy
import gc
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from sora_kernels.last_result import LastResult


@pytest.fixture
def counted() -> tuple[LastResult[Tensor], list[int]]:
    calls: list[int] = []

    @LastResult
    def scaled(x: Tensor, y: Tensor, factor: int = 1) -> Tensor:
        calls.append(factor)
        return (x + y) * factor

    return scaled, calls


def test_once_for_the_same_arguments(counted) -> None:
    (scaled, calls), x, y = counted, torch.ones(3), torch.ones(3)
    assert scaled(x, y, 2) is scaled(x, y, 2)
    assert calls == [2]


@pytest.mark.parametrize(
    "change", ["in place", "other memory", "another shape", "another tensor", "another place", "another constant"]
)
def test_again_after_a_change(counted, change: str) -> None:
    (scaled, calls), x, y = counted, torch.ones(3), torch.full((3,), 5.0)
    scaled(x, y, 2)
    if change == "in place":
        x += 1
    elif change == "other memory":
        x.data = torch.zeros(3)  # which torch does not count
    elif change == "another shape":
        x.data = x.data[:1]
    elif change == "another tensor":
        y = y.clone()
    elif change == "another place":
        x, y = y, x
    factor = 3 if change == "another constant" else 2
    torch.testing.assert_close(scaled(x, y, factor), (x + y) * factor)
    assert len(calls) == 2


def test_each_time_where_a_gradient_is_asked_for(counted) -> None:
    (scaled, _), x, y = counted, torch.ones(3, requires_grad=True), torch.ones(3)
    for _ in range(2):  # a kept result would have lost its graph
        scaled(x, y).sum().backward()
    torch.testing.assert_close(x.grad, torch.full((3,), 2.0))


def test_tensors_of_inference_mode(counted) -> None:
    scaled, _ = counted
    with torch.inference_mode():
        x, y = torch.ones(3), torch.ones(3)
        scaled(x, y)
        x += 1
        torch.testing.assert_close(scaled(x, y), x + y)


def test_a_result_of_inference_mode_is_not_used_in_training(counted) -> None:
    (scaled, _), x, y = counted, torch.ones(3), torch.ones(3)
    with torch.inference_mode():
        scaled(x, y)
    w = torch.ones(3, requires_grad=True)
    (w * scaled(x, y)).sum().backward()
    torch.testing.assert_close(w.grad, x + y)


def test_freed_with_its_tensors(counted) -> None:
    (scaled, _), x, y = counted, torch.ones(3), torch.ones(3)
    result = weakref.ref(scaled(x, y))
    del x
    gc.collect()
    assert result() is None


def test_compiled(counted) -> None:
    (scaled, _), x, y = counted, torch.ones(3), torch.ones(3)
    compiled = torch.compile(lambda x, y: scaled(x, y, 3), fullgraph=True, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x, y), (x + y) * 3)
        x += 1


def test_fake_tensors_have_no_address(counted) -> None:
    scaled, calls = counted
    with FakeTensorMode():
        x = torch.ones(3)
        for _ in range(2):
            assert scaled(x, x, 2).shape == (3,)
    torch.func.vmap(lambda x: scaled(x, x, 3))(torch.ones(2, 3))
    assert calls == [2, 2, 3]


@pytest.mark.parametrize("parts", [lambda x: x, lambda x: [(x, 1)]], ids=["tensor", "list of tuples"])
def test_a_fake_result_is_not_kept(parts: Callable) -> None:
    """A mode may make one of tensors that are none."""
    doubled, x = LastResult(lambda x: parts(2 * x)), torch.ones(3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        doubled(x)
    torch.testing.assert_close(doubled(x), parts(2 * x), rtol=0, atol=0)
    assert doubled(x) is doubled(x)


def test_sparse_tensors_have_no_address(counted) -> None:
    (scaled, calls), x = counted, torch.ones(3).to_sparse()
    for _ in range(2):
        scaled(x, x)
    assert calls == [1, 1]


@pytest.mark.parametrize("record", [make_fx, partial(torch.jit.trace, check_trace=False)], ids=["make_fx", "jit"])
def test_a_graph_has_no_kept_result(counted, record: Callable) -> None:
    (scaled, _), x, y = counted, torch.ones(3), torch.ones(3)
    scaled(x, y, 2)
    recorded = record(lambda x, y: scaled(x, y, 2))(x, y) if record is make_fx else record(lambda x, y: scaled(x, y, 2), (x, y))
    torch.testing.assert_close(recorded(y, 4 * y), 10 * y)


def test_freed_before_its_tensors() -> None:
    """Python may not look for cycles while a GPU's memory runs out."""
    scaled, x = LastResult(lambda x: 2 * x), torch.ones(3)
    result = weakref.ref(scaled(x))
    gc.disable()
    try:
        del scaled
        assert result() is None
    finally:
        gc.enable()


def test_copies(counted) -> None:
    """Of what has a kept result, which belongs to the original's tensors."""
    (scaled, calls), x = counted, torch.ones(3)
    scaled(x, x)
    torch.testing.assert_close(copy.deepcopy(scaled)(x, x), 2 * x)
    assert calls == [1, 1]
