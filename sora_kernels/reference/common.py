"""What every op of the reference shares: the dtype of computation, and how values and gradients get into the outputs."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

Tensors = Sequence[Tensor | None]


def widen(x: Tensor) -> Tensor:
    """`x` in the dtype it is computed in: float64 stays, anything narrower becomes float32.

    Contiguous, because a matrix product may give other last bits for other strides.
    """
    return (x if x.dtype == torch.float64 else x.float()).contiguous()


def zero_rows(rows: Tensor, count: int) -> Tensor:
    """`rows` [n, ...] followed by zeros up to `count` rows: the tokens past the last boundary.

    >>> zero_rows(torch.ones(3, 8), 5).shape
    torch.Size([5, 8])
    """
    return torch.cat([rows, rows.new_zeros(count - rows.shape[0], *rows.shape[1:])])


class _Collecting(threading.local):
    values: dict[int, tuple[Tensor, Tensor]] | None = None


_collecting = _Collecting()


@contextlib.contextmanager
def collecting(values: dict[int, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Inside, in this thread, `write` stores nothing, but puts id(output): (output, value) into `values`.

    So a function that is differentiated gives its values themselves: nothing can be stored that a transform of torch.func follows.
    """
    before, _collecting.values = _collecting.values, values
    try:
        yield
    finally:
        _collecting.values = before


def write(values: Tensors, outputs: Tensors) -> None:
    """Store each value in its output, in the output's dtype; an output of None is not wanted."""
    for value, output in zip(values, outputs, strict=True):
        if value is None or output is None:
            continue
        if _collecting.values is None:
            output.copy_(value)
        else:
            _collecting.values[id(output)] = output, value.to(output.dtype)


def write_gradients(function: Callable[..., Sequence[Tensor]], inputs: Tensors, cotangents: Tensors, outputs: Tensors) -> None:
    """Store in `outputs` the gradients of `function(*inputs)` for the given cotangents of its results.

    An input of None is passed on as it is and has no gradient; a cotangent of None counts as zero.
    """
    if _collecting.values is not None:
        write(pull_back(function, inputs, cotangents), outputs)
        return
    # A registered op runs with autograd switched off in the dispatcher, where enable_grad alone has no effect.
    with torch.inference_mode(False):
        leaves = [None if x is None else _ordinary(x).detach().requires_grad_() for x in inputs]
        given = [None if c is None else _ordinary(c) for c in cotangents]
        pairs = zip(function(*leaves), given, strict=True)
        # a result of no sample at all depends on nothing
        used = [(r, c.to(r.dtype).contiguous()) for r, c in pairs if c is not None and r.requires_grad]
        present = [x for x in leaves if x is not None]
        found = torch.autograd.grad([r for r, _ in used], present, [c for _, c in used], materialize_grads=True)
    gradients = iter(found)
    write([None if x is None else next(gradients) for x in inputs], outputs)


def _ordinary(x: Tensor) -> Tensor:
    """`x`, or a copy that autograd can follow of a tensor that was made in inference mode."""
    return x.clone() if x.is_inference() else x


def pull_back(function: Callable[..., Sequence[Tensor]], inputs: Tensors, cotangents: Tensors) -> Tensors:
    """Gradients of `function(*inputs)` that can be differentiated themselves; None where the input is None."""

    def of_present(*given: Tensor) -> tuple[Tensor, ...]:
        rest = iter(given)
        return tuple(function(*(None if x is None else next(rest) for x in inputs)))

    results, pullback, *_ = torch.func.vjp(of_present, *(x for x in inputs if x is not None))
    found = iter(
        pullback(tuple(torch.zeros_like(r) if c is None else c.to(r.dtype) for r, c in zip(results, cotangents, strict=True)))
    )
    return [None if x is None else next(found) for x in inputs]
