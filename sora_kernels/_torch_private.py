"""The private parts of torch that we use: each saves microseconds of every call, and has a public way beside it.

The public way is taken where torch has the private name no more, or where `SORA_KERNELS_TORCH=public` says so (read at import).
Torch's kernels of attention for packed batches have no public way; they are backends that are asked only when wanted.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad


class _Probe(torch.autograd.Function):
    """Of the old kind, without setup_context: torch.func's transforms refuse it, and nothing else does."""

    @staticmethod
    def forward(ctx: Any, x: None) -> None:
        return None


def transforms_active_publicly() -> bool:
    try:
        _Probe.apply(None)
    except RuntimeError:
        return True
    return False


_probing = threading.Lock()


def is_dual_level_open_publicly() -> bool:
    with _probing:  # the level is the process's: of two threads, one would find the other's
        try:
            level = forward_ad.enter_dual_level()
        except RuntimeError:  # there is one, and they do not nest
            return True
        forward_ad.exit_dual_level(level=level)
        return False


def below_autograd_publicly() -> contextlib.AbstractContextManager[None]:
    return torch.no_grad()


# The dispatcher's keys down to autograd's.
_CONSUMED = ("PythonTLSSnapshot", "AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView")


def past_autograd_publicly(keyset: Any) -> Any:
    keys = type(keyset.highestPriorityTypeId()).__members__
    for name in _CONSUMED:
        keyset = keyset.remove(keys[name])
    return keyset


def _past_autograd(keyset: Any) -> Any:
    return keyset & torch._C._after_autograd_keyset


def _is_dual_level_open() -> bool:
    return forward_ad._current_level >= 0


class Ways(NamedTuple):
    # Whether a transform of torch.func is going on, such as grad or vmap.
    transforms_active: Callable[[], bool]
    # Whether forward-mode differentiation is.
    is_dual_level_open: Callable[[], bool]
    # A context in which autograd records nothing, or is even passed by.
    below_autograd: Callable[[], Any]
    # The keys with which a kernel for autograd calls the dispatcher again.
    past_autograd: Callable[[Any], Any]


PUBLIC = Ways(transforms_active_publicly, is_dual_level_open_publicly, below_autograd_publicly, past_autograd_publicly)


def choose() -> Ways:
    """The private ways, or the public ones, where torch lacks a private one or the environment wants that."""
    way = os.environ.get("SORA_KERNELS_TORCH") or "private"
    if way not in ("private", "public"):
        raise ValueError(f"sora_kernels: SORA_KERNELS_TORCH: expected 'private' or 'public', got {way!r}")
    if way == "public" or not hasattr(forward_ad, "_current_level") or not hasattr(torch._C, "_after_autograd_keyset"):
        return PUBLIC
    try:
        active, below = torch._C._are_functorch_transforms_active, torch._C._AutoDispatchBelowAutograd
    except AttributeError:
        return PUBLIC
    return Ways(active, _is_dual_level_open, below, _past_autograd)


_ways = choose()
if _ways is PUBLIC:
    # torch.compile cannot trace how these find out. Only here, as it imports the compiler.
    torch.compiler.assume_constant_result(transforms_active_publicly)
    torch.compiler.assume_constant_result(is_dual_level_open_publicly)
transforms_active, is_dual_level_open, below_autograd, past_autograd = _ways


def attention_kernel(name: str) -> Callable[..., Any]:
    """One of torch's own, such as `_flash_attention_forward`."""
    return getattr(torch.ops.aten, name)
