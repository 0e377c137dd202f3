"""`torch.nn.functional.scaled_dot_product_attention` replaced within a context, whoever calls it.

It is a function mode of torch: modules that imported the function by name are reached, nothing of torch is patched, and other
threads keep torch's own. torch.compile traces the replacement, and compiles anew outside of it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...attention import scaled_dot_product_attention
from ...checks import fail

_Function = TypeVar("_Function", bound=Callable[..., Any])


@overload
def replace() -> Replacement: ...
@overload
def replace(function: _Function, /) -> _Function: ...
def replace(function: Any = None, /) -> Any:
    """A context, or decorator, within which torch's attention is `sora_kernels.attention.scaled_dot_product_attention`.

    >>> layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    >>> with replace():
    ...     y = layer(torch.randn(2, 100, 64))
    >>> y.shape
    torch.Size([2, 100, 64])

    It holds for the thread that enters it, and for a backward within: recomputed activations use the attention of the forward.
    Contexts nest. `nn.MultiheadAttention` and `nn.TransformerEncoderLayer` leave their fused inference path, which has an attention
    of its own, and call this one.

    Calls inside TorchScript and inside the body of a custom operator are not seen.

    Raises:
        ValueError, TypeError: from a call that cannot be honoured, such as one with dropout: none goes back to torch's attention.
    """
    if function is None:
        return Replacement()
    if not inspect.isroutine(function):
        fail("replace", "function", "nothing for a context, or a function to decorate", type(function).__name__, TypeError)
    return Replacement()(function)


class Replacement(TorchFunctionMode, contextlib.ContextDecorator):
    def __call__(self, func: _Function) -> _Function:
        for kind in (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction):
            if kind(func) or kind(type(func).__call__):  # its body runs when the call has returned
                name = getattr(func, "__name__", str(func))
                fail("replace", name, "a function to decorate", "a generator or coroutine (use the context inside it)", TypeError)
        return super().__call__(func)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention or func is _ATEN or func is _ATEN.default:
            return scaled_dot_product_attention(*args, **kwargs)
        if func is Tensor.unflatten:  # as a function, torch.compile cannot trace it
            return args[0].unflatten(*args[1:], **kwargs)
        for function, body in _CALLERS:
            if func is function:
                with self:  # which is off in here
                    return body(*args, **kwargs)
        return func(*args, **kwargs)


_ATEN = torch.ops.aten.scaled_dot_product_attention


def _body(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its check for overrides always False: what it does once nothing overrides it."""
    names = {name: lambda *_: False for name in function.__globals__ if name.startswith("has_torch_function")}
    copy = FunctionType(function.__code__, function.__globals__ | names, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


# Functions that may be overridden themselves, and that call attention: in a backward, checkpointed forwards do.
_CALLERS = tuple(
    (function, _body(function))
    for function in (F.multi_head_attention_forward, Tensor.backward, torch.autograd.backward, torch.autograd.grad)
)
