"""Derivatives that no kernel computes: forward mode, and derivatives of gradients.

They are taken of the reference's formulas in plain torch, which differentiates them as often as it is asked to: right for every op
and dtype, but slow, and attention takes memory for its score matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends


def composed(run: Callable[..., Any], *args: Any) -> Any:
    """What an op's body `run` returns, as the reference computes it, with all of the computation open to autograd."""
    values: dict[int, tuple[Tensor, Tensor]] = {}
    with backends.only_here("reference"), backends.BACKENDS["reference"].load().collecting(values):
        outputs = run(*args)
    return _map(lambda x: values[id(x)][1] if id(x) in values else x, outputs)  # what is empty as it is not wanted stays


def carry_tangents(args: Any) -> bool:
    """Whether forward-mode differentiation is going on and goes through these arguments of an op."""
    if forward_ad._current_level < 0:
        return False
    if torch._C._are_functorch_transforms_active():  # then a tangent may lie below what can be seen of a tensor
        return True
    return any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in _flat(args))


def through(formula: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., None]]:
    """(backward, setup_context) of an op, as torch.library takes them, that differentiate `formula`, the op in plain torch."""

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        tensors: list[Tensor] = []
        ctx.arguments = [_map(lambda x: tensors.append(x) or _Saved(len(tensors) - 1), x) for x in inputs]  # type: ignore[func-returns-value]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    def backward(ctx: Any, *cotangents: Any) -> tuple:
        saved = ctx.saved_tensors
        moving = [i for i, x in enumerate(saved) if x.is_floating_point()]

        def of_moving(*given: Tensor) -> tuple[Tensor, ...]:
            tensors = dict(enumerate(saved)) | dict(zip(moving, given, strict=True))
            return tuple(_flat(formula(*_map(lambda x: tensors[x.index], ctx.arguments))))

        with backends.without_autocast(saved[0].device.type):
            results, pullback, *_ = torch.func.vjp(of_moving, *(saved[i] for i in moving))
            given = zip(results, _flat(cotangents), strict=True)
            grads = dict(zip(moving, pullback(tuple(torch.zeros_like(r) if c is None else c for r, c in given)), strict=True))
        return tuple(_map(lambda x: grads.get(x.index), x) if _has_saved(x) else None for x in ctx.arguments)

    return backward, setup_context


class _Saved:
    """The place of a tensor among those that are saved."""

    def __init__(self, index: int) -> None:
        self.index = index


def _has_saved(x: Any) -> bool:
    return any(isinstance(item, _Saved) for item in _flat(x))


def _map(function: Callable[[Any], Any], x: Any) -> Any:
    """`x` with `function` of every tensor, or what stands for one, that it is or lists."""
    if isinstance(x, Tensor | _Saved):
        return function(x)
    return type(x)(_map(function, item) for item in x) if isinstance(x, list | tuple) else x


def _flat(x: Any) -> list:
    return [item for part in x for item in _flat(part)] if isinstance(x, list | tuple) else [x]
