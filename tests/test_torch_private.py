"""The public ways beside the private parts of torch: they give the same, are taken where they must be, and all ops work by them."""

import contextlib
import os
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

from sora_kernels._torch_private import PUBLIC, choose
from sora_kernels.bias_gelu import bias_gelu


def answers() -> list[tuple[bool, bool]]:
    """(by the private way, by the public one) of both questions."""
    private = choose()
    assert private is not PUBLIC
    return [(ours(), public()) for ours, public in zip(private[:2], PUBLIC[:2], strict=True)]


@pytest.fixture(autouse=True)
def private_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SORA_KERNELS_TORCH", raising=False)


def inside(transform: Callable[..., Any]) -> list[tuple[bool, bool]]:
    seen: list[list[tuple[bool, bool]]] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.append(answers())
        return x.sum()

    transform(function)
    return seen[0]


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        (lambda f: f(X), (False, False)),
        (lambda f: torch.func.grad(f)(X), (True, False)),
        (lambda f: torch.vmap(f)(X), (True, False)),
        (lambda f: torch.func.jvp(f, (X,), (X,)), (True, True)),
        (lambda f: torch.func.grad(lambda x: torch.func.jvp(f, (x,), (X,))[1])(X), (True, True)),
    ],
    ids=["nothing", "grad", "vmap", "jvp", "grad of jvp"],
)
def test_both_ways_agree(transform: Callable[..., Any], expected: tuple[bool, bool]) -> None:
    assert inside(transform) == [(x, x) for x in expected]


def test_both_ways_agree_in_a_dual_level() -> None:
    with forward_ad.dual_level():
        assert answers() == [(False, False), (True, True)]
    assert answers() == [(False, False), (False, False)]


def test_public_where_torch_has_no_private_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose() is not PUBLIC
    needed = ("_are_functorch_transforms_active", "_AutoDispatchBelowAutograd", "_after_autograd_keyset")
    names = {name: getattr(torch._C, name) for name in needed}
    for missing in names:
        present = {name: value for name, value in names.items() if name != missing}
        with monkeypatch.context() as patch:
            patch.setattr(torch, "_C", types.SimpleNamespace(**present))
            assert choose() is PUBLIC
    with monkeypatch.context() as patch:
        patch.delattr(forward_ad, "_current_level")
        assert choose() is PUBLIC


def test_public_where_the_environment_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SORA_KERNELS_TORCH", "public")
    assert choose() is PUBLIC
    monkeypatch.setenv("SORA_KERNELS_TORCH", "secret")
    with pytest.raises(ValueError, match="SORA_KERNELS_TORCH: expected 'private' or 'public', got 'secret'"):
        choose()


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_a_backward_op_in_every_mode(mode: Callable[[], Any]) -> None:
    """float64 is the reference's, which differentiates inside the op."""
    with mode():
        x, bias = torch.ones(3, 4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
        dx, dbias = torch.ops.sora_kernels.bias_gelu_backward(x, x, bias)
    leaves = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
    assert all(map(torch.equal, (dx, dbias), torch.autograd.grad(bias_gelu(*leaves).sum(), leaves)))


# Forward, backward, under torch.compile, torch.func and forward mode.
SAMPLE = (
    "test_library or (test_of_kernels and float32) or what_was or dual_tensors "
    "or (cpu-cpu-float32 and (repeatable or (test_compiled and aot_eager)))"
)


def test_ops_work_by_the_public_ways() -> None:
    files = [f"tests/test_{name}.py" for name in ("library", "derivatives", "bias_gelu", "patch_embed", "patchify")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not emulated", "-k", SAMPLE, *files]
    env = {**os.environ, "SORA_KERNELS_TORCH": "public"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    check = "from sora_kernels import _torch_private as p; print(p.transforms_active is p.PUBLIC.transforms_active)"
    assert subprocess.run([sys.executable, "-c", check], env=env, capture_output=True, text=True, check=False).stdout == "True\n"
