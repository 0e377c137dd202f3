"""What each layer of a model would compute anew from the same tensors: the first one computes it, the others get its result."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ._torch_private import transforms_active

PLAIN = (Tensor, nn.Parameter)  # others may stand for a tensor, without an address
R = TypeVar("R")


class _Kept(NamedTuple):
    tensors: list[weakref.ref]
    versions: list[tuple[Any, ...]]
    """Of the tensors: they count changes in place; and what shows `x.data = y`, which is not counted."""
    others: tuple[Any, ...]
    """The other arguments, the stream, and whether it was inference mode."""
    result: Any


class LastResult(Generic[R]):
    """A function of tensors and constants, given by position, whose last result is kept while its tensors live unchanged.

    It computes each time where a kept result could be wrong or cannot be used: for tensors that require a gradient, for those of
    inference mode, whose changes are not counted, in torch.compile and where else a graph is recorded for other values: by make_fx,
    torch.jit.trace, or the capture of a CUDA graph; and what a mode such as FakeTensorMode makes of real tensors is not kept. A
    result belongs to the stream that has computed it. Not seen is what torch does not count, as autograd does not see it either:
    what is written through `x.data` or through an array of the same memory.
    """

    def __init__(self, compute: Callable[..., R]) -> None:
        self.__doc__, self.__module__, self.__wrapped__ = compute.__doc__, compute.__module__, compute
        self.compute = compute
        self.kept: _Kept | None = None

    def __call__(self, *args: Any) -> R:
        if torch.compiler.is_compiling():
            return self.compute(*args)
        tensors = [x for x in args if isinstance(x, Tensor)]
        on_cuda = next((x.device for x in tensors if x.is_cuda), None)
        if transforms_active() or _is_recorded() or not all(map(_can_be_known, tensors)):
            return self.compute(*args)
        if on_cuda and torch.cuda.is_current_stream_capturing():
            return self.compute(*args)
        stream = None if on_cuda is None else torch.cuda.current_stream(on_cuda)
        others = (*(x for x in args if not isinstance(x, Tensor)), stream, torch.is_inference_mode_enabled())
        versions = [(x._version, x.data_ptr(), x.dtype, x.shape, x.stride()) for x in tensors]
        kept = self.kept
        if (
            kept is None
            or (kept.versions, kept.others) != (versions, others)
            or not all(reference() is x for reference, x in zip(kept.tensors, tensors, strict=True))
        ):
            result = self.compute(*args)
            if not all(type(x) in PLAIN for x in _tensors_in(result)):
                return result
            forget = functools.partial(_forget, weakref.ref(self))
            kept = self.kept = _Kept([weakref.ref(x, forget) for x in tensors], versions, others, result)
        return kept.result

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kept": None}  # weak references cannot be copied


def _forget(owner: weakref.ref[LastResult], gone: weakref.ref) -> None:
    """Frees the result of a tensor that is gone; the tensors of a LastResult do not keep it alive."""
    last = owner()
    if last is not None and last.kept is not None and any(reference is gone for reference in last.kept.tensors):
        last.kept = None


def _tensors_in(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, list | tuple):
        for part in result:
            yield from _tensors_in(part)


def _can_be_known(x: Tensor) -> bool:
    """Whether a change of it shows, in its count of changes or its address."""
    return type(x) in PLAIN and x.layout == torch.strided and not x.requires_grad and not x.is_inference()


def _is_recorded() -> bool:
    """Whether what is called becomes a graph of make_fx or torch.jit.trace."""
    tracer = sys.modules.get("torch.fx.experimental.proxy_tensor")  # which takes long to import
    return torch.jit.is_tracing() or (tracer is not None and tracer.get_proxy_mode() is not None)
