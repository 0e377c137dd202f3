"""Derivatives that no kernel computes: forward mode, and derivatives of gradients.

They are taken of the reference's formulas in plain torch, which differentiates them as often as it is asked to: right for every op
and dtype, but slow, and attention takes memory for its score matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends
from ._torch_private import is_dual_level_open, transforms_active


def composed(run: Callable[..., Any], *args: Any) -> Any:
    """What an op's body `run` returns, as the reference computes it, with all of the computation open to autograd."""
    values: dict[int, tuple[Tensor, Tensor]] = {}
    with backends.only_here("reference"), backends.BACKENDS["reference"].load().collecting(values):
        outputs = run(*args)
    return map_tensors(lambda x: values[id(x)][1] if id(x) in values else x, outputs)  # what is empty as it is not wanted stays


def carry_tangents(args: Any) -> bool:
    """Whether forward-mode differentiation is going on and goes through these arguments of an op."""
    if not is_dual_level_open():
        return False
    if transforms_active():  # then a tangent may lie below what can be seen of a tensor
        return True
    return any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in flat(args))


def through(formula: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., None]]:
    """(backward, setup_context) of an op, as torch.library takes them, that differentiate `formula`, the op in plain torch."""

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        tensors, ctx.arguments = take_apart(inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    def backward(ctx: Any, *cotangents: Any) -> tuple:
        saved = ctx.saved_tensors
        moving = [i for i, x in enumerate(saved) if x.is_floating_point()]

        def of_moving(*given: Tensor) -> tuple[Tensor, ...]:
            tensors = dict(enumerate(saved)) | dict(zip(moving, given, strict=True))
            return tuple(flat(formula(*put_together(ctx.arguments, tensors))))

        with backends.without_autocast(saved[0].device.type):
            results, pullback, *_ = torch.func.vjp(of_moving, *(saved[i] for i in moving))
            pairs = zip(results, flat(cotangents), strict=True)
            found = pullback(tuple(torch.zeros_like(r) if c is None else c for r, c in pairs))
        grads: dict[int, Tensor | None] = dict.fromkeys(range(len(saved))) | dict(zip(moving, found, strict=True))
        return tuple(put_together(x, grads) if has_place(x) else None for x in ctx.arguments)

    return backward, setup_context


class Place:
    """Stands for the tensor with this index in a list."""

    def __init__(self, index: int) -> None:
        self.index = index


def take_apart(x: Any) -> tuple[list[Tensor], Any]:
    """The tensors that `x` is or lists, and `x` with a `Place` for each of them."""
    tensors: list[Tensor] = []

    def placed(tensor: Tensor) -> Place:
        tensors.append(tensor)
        return Place(len(tensors) - 1)

    return tensors, map_tensors(placed, x)


def put_together(x: Any, tensors: Sequence[Any] | Mapping[int, Any]) -> Any:
    """`x` with the tensors in their places."""
    if isinstance(x, Place):
        return tensors[x.index]
    return type(x)(put_together(item, tensors) for item in x) if isinstance(x, list | tuple) else x


def has_place(x: Any) -> bool:
    return any(isinstance(item, Place) for item in flat(x))


def map_tensors(function: Callable[[Tensor], Any], x: Any) -> Any:
    """`x` with `function` of every tensor that it is or lists."""
    if isinstance(x, Tensor):
        return function(x)
    return type(x)(map_tensors(function, item) for item in x) if isinstance(x, list | tuple) else x


def flat(x: Any) -> list:
    return [item for part in x for item in flat(part)] if isinstance(x, list | tuple) else [x]
