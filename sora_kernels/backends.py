"""Which implementation runs: an ordered list per device, with the reason why one is passed over.

A backend is a namespace (a module) with one function per op and pass, with the names and arguments of signatures.py, that writes
into outputs the caller allocated. The first backend in the list of the tensor's device that can do the work does it. Nothing
falls back in silence: `python -m sora_kernels.info` prints the list, `record()` tells which backend ran, and a forced backend that
cannot run raises with the reason.

Attention has more backends: kernels that others wrote (`sora_kernels.flash`), and those for Hopper. They are asked only after
`prefer("fastest")`, as no one has measured here whether they keep what this package promises.

Force one with the environment variable `SORA_KERNELS_BACKEND` or `with use_backend("reference"):`. Both hold for the whole
process, so that autograd's own threads, which run the backward passes, obey too. Derivatives that no kernel computes
(derivatives.py) are the reference's all the same: there is no other.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import threading
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from . import flash
from .checks import check_choice
from .signatures import SIGNATURES

__all__ = ["forced_backend", "prefer", "record", "use_backend"]  # what users call

_HALF = (torch.bfloat16, torch.float16)
_STORAGE = (torch.float32, *_HALF)

FUNCTIONS = tuple(SIGNATURES)


@dataclass(frozen=True)
class Backend:
    """One implementation: where its functions live and what it can take.

    Its module may have a function `unavailable()` that says why nothing of it can run on this machine, or None, and another one,
    `refuses(function, arguments)`, that says why it cannot do a call, or None. If its `TAKES_HINTS` is True, its functions take the
    hints of their signatures, too.
    """

    name: str
    module: str
    devices: tuple[str, ...] | None  # None: any
    dtypes: tuple[torch.dtype, ...] | None
    max_width: Mapping[str, int] = field(default_factory=dict)  # the longest last axis (d or D) per function; default any

    def load(self) -> ModuleType:
        return importlib.import_module(self.module, __package__)

    def unavailable(self, function: str, device: str, dtype: torch.dtype, width: int = 0) -> str | None:
        """Why this backend cannot run `function` on tensors whose last axis is `width` long; None if it can."""
        if self.devices is not None and device not in self.devices:
            return f"takes {' and '.join(self.devices)} tensors, not {device}"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"has no {str(dtype).removeprefix('torch.')} kernels"
        if width > self.max_width.get(function, width):
            return f"takes a last axis of at most {self.max_width[function]}, not {width}"
        try:
            module = self.load()
        except (ImportError, AttributeError) as error:  # a library of another version may lack a name that the module takes
            if "SORA_KERNELS_" in str(error):  # a wrong setting, which another backend must not hide
                raise ValueError(str(error)) from None
            return f"cannot be imported: {error}"
        if not hasattr(module, function):
            return f"has no {function}"
        return module.unavailable() if hasattr(module, "unavailable") else None


# Triton's interpreter runs its kernels on CPU tensors; Triton reads the variable when a kernel is defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_ATTENTION, _ROPE = ([name for name in FUNCTIONS if word in name] for word in ("attention", "rope"))

Entry = TypeVar("Entry")


class Registry(UserDict[str, Entry]):
    """A dict that `call` may remember answers of: a change of an entry makes it ask anew."""

    def __setitem__(self, name: str, entry: Entry) -> None:
        super().__setitem__(name, entry)
        _select.cache_clear()

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        _select.cache_clear()


class Selected(NamedTuple):
    """A backend's name, its function, what says why it cannot do a call, if anything does, and the hints that it does not take."""

    backend: str
    run: Callable[..., None]
    refuses: Callable[[str, dict], str | None] | None
    unwanted: tuple[str, ...]

    @classmethod
    def of(cls, backend: str, function: str) -> Selected:
        module = BACKENDS[backend].load()
        unwanted = () if getattr(module, "TAKES_HINTS", False) else SIGNATURES[function].hints
        return cls(backend, getattr(module, function), getattr(module, "refuses", None), unwanted)


@functools.lru_cache(1024)  # a width may be that of a video, of which there are ever new ones
def _select(
    function: str, on: torch.device, dtype: torch.dtype, width: int, forced: str | None, preferred: str
) -> tuple[Selected, ...]:
    """The backends that can serve such tensors, up to the first one that can do any call of them."""
    device = on.type
    if forced is not None:
        reason = BACKENDS[forced].unavailable(function, device, dtype, width)
        if reason is not None:
            raise ValueError(f"{function}: backend {forced!r} was forced but {reason}")
        return (Selected.of(forced, function),)
    asked = candidates(function, device, dtype, width, preferred)
    able: list[Selected] = []
    for name, reason in asked:
        if reason is None:
            able.append(Selected.of(name, function))
            if able[-1].refuses is None:
                break
    if not able:
        raise ValueError(f"{function}: no backend can run: " + "; ".join(f"{name} {reason}" for name, reason in asked))
    return tuple(able)


def _choose(able: tuple[Selected, ...], function: str, arguments: dict) -> Selected:
    """The first that can do this call."""
    reasons = []
    for selected in able:
        reason = None if selected.refuses is None else selected.refuses(function, arguments)
        if reason is None:
            return selected
        reasons.append(f"{selected.backend} {reason}")
    raise ValueError(f"{function}: {NO_BACKEND}: " + "; ".join(reasons))


BACKENDS: Registry[Backend] = Registry()
for _backend in (
    Backend("cpu", "._cpu", ("cpu",), _STORAGE),
    Backend("cuda", "._cuda", ("cuda",), _STORAGE, dict.fromkeys(_ROPE, 512)),
    *(Backend(name, f".flash.{name}", ("cuda",), _HALF, dict.fromkeys(_ATTENTION, 256)) for name in flash.FOREIGN),
    Backend("hopper", ".triton.hopper", ("cuda",), _HALF, dict.fromkeys(_ATTENTION, 128)),
    Backend("triton", ".triton", ("cuda", "cpu") if INTERPRETED else ("cuda",), _STORAGE, dict.fromkeys(_ATTENTION, 256)),
    Backend("reference", ".reference", None, None),
):
    BACKENDS[_backend.name] = _backend
# The order in which backends are asked, per device type; other devices ask the reference only.
ORDER: Registry[tuple[str, ...]] = Registry(
    cpu=("cpu", "triton", "reference") if INTERPRETED else ("cpu", "reference"),
    cuda=("cuda", "triton", "reference"),
)

PREFERENCES = ("default", "fastest")
NO_BACKEND = "no backend can do this call"


class _Here(threading.local):
    """What holds for one thread only."""

    forced: str | None = None


@dataclass(eq=False)
class _Use:
    """A `use_backend` that is open."""

    name: str
    thread: int = field(default_factory=threading.get_ident)


@dataclass(eq=False)
class _Record:
    """A `record` that is open."""

    calls: list[tuple[str, str]] = field(default_factory=list)
    thread: int = field(default_factory=threading.get_ident)


_here = _Here()
_lock = threading.Lock()
_forced: str | None = None  # that of the last of _uses, or else the environment's
_uses: list[_Use] = []  # in any thread
_records: list[_Record] = []
_preferred = "default"


def candidates(
    function: str, device: str, dtype: torch.dtype, width: int = 0, preference: str | None = None
) -> list[tuple[str, str | None]]:
    """(backend, why it cannot run or None), in the order in which they are asked; `preference` instead of what `prefer` said."""
    if preference is not None:
        check_choice("candidates", "preference", preference, PREFERENCES)
    order = ORDER.get(device, ("reference",))
    if (preference or _preferred) == "fastest" and device == "cuda" and function in flash.FUNCTIONS:
        order = flash.fastest() + order
    return [(name, BACKENDS[name].unavailable(function, device, dtype, width)) for name in order]


def call(function: str, like: Tensor, /, **arguments: object) -> None:
    """Runs `function` on the backend that serves tensors such as `like`, on like's GPU if it is on one.

    arguments: by the names in `signatures.SIGNATURES`.
    """
    if like.is_cuda and like.device.index != torch.cuda.current_device():
        with torch.cuda.device(like.device):  # before a backend is asked, too, as it answers for the present GPU
            return call(function, like, **arguments)
    able = _select(function, like.device, like.dtype, like.shape[-1], _here.forced or _forced, _preferred)
    backend, run, _, unwanted = able[0] if able[0].refuses is None else _choose(able, function, arguments)
    for name in unwanted:
        del arguments[name]
    for record_ in list(_records):
        record_.calls.append((function, backend))
    if backend == "reference":
        with without_autocast(like.device.type):
            run(**arguments)
    else:
        run(**arguments)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces one backend for every op run inside, forward and backward, in the whole process.

    >>> with use_backend("reference"):
    ...     y = rope_3d(x, layout)

    Of several that are open at once, in whatever threads, the one entered last holds.

    Raises:
        ValueError: at once if the name is unknown; at the call if that backend cannot run it.
    """
    check_choice("use_backend", "name", name, tuple(BACKENDS))
    use = _Use(name)
    _update_uses(_uses.append, use)
    try:
        yield
    finally:
        _update_uses(partial(_close, _uses), use)


def _update_uses(change: Callable[[_Use], None], use: _Use) -> None:
    global _forced
    with _lock:
        change(use)
        _forced = _uses[-1].name if _uses else _from_environment()


def _close(items: list, item: object) -> None:
    """Removes it, unless a fork did."""
    if item in items:
        items.remove(item)


def _after_fork() -> None:
    """Forgets what other threads had open: a forked process has only the one that forked, and nobody would close theirs."""
    global _lock, _forced
    _lock = threading.Lock()  # another thread may have held it
    here = threading.get_ident()
    _uses[:] = [use for use in _uses if use.thread == here]
    _records[:] = [record_ for record_ in _records if record_.thread == here]
    _forced = _uses[-1].name if _uses else _from_environment()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def without_autocast(device: str) -> contextlib.AbstractContextManager:
    """Inside, the products of plain torch keep their dtype."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


@contextlib.contextmanager
def only_here(name: str) -> Iterator[None]:
    """Forces one backend for every op run inside in this thread, whatever `use_backend` says."""
    before, _here.forced = _here.forced, name
    try:
        yield
    finally:
        _here.forced = before


def prefer(what: str) -> None:
    """Says in which order backends are asked from now on, in the whole process.

    >>> prefer("fastest")                   # attention by FlashAttention, cuDNN or the kernels for Hopper GPUs, where they can
    >>> prefer("default")

    Args:
        what: "default": the kernels that keep this package's promises: packed samples get what they get alone, bit for bit, results
            do not vary from run to run, NaNs stay in their sample. "fastest": first what should be fastest on the present GPU, by
            `sora_kernels.flash`'s table, whether it keeps them or not. On the CPU both are the same.

    Raises:
        ValueError: if it is neither.
    """
    global _preferred
    check_choice("prefer", "what", what, PREFERENCES)
    _preferred = what


def preferred() -> str:
    """What `prefer` said last."""
    return _preferred


def forced_backend() -> str | None:
    """The backend that `use_backend` or the environment forces, if any."""
    return _forced


@contextlib.contextmanager
def record() -> Iterator[list[tuple[str, str]]]:
    """Yields a list that fills with (function, backend) for every backend function run inside.

    >>> with record() as calls:
    ...     y = rope_3d(x, layout)
    >>> calls
    [('rope_3d', 'cpu')]
    """
    opened = _Record()
    _records.append(opened)
    try:
        yield opened.calls
    finally:
        _close(_records, opened)


def _from_environment() -> str | None:
    name = os.environ.get("SORA_KERNELS_BACKEND")
    if name:
        check_choice("sora_kernels", "SORA_KERNELS_BACKEND", name, tuple(BACKENDS))
    return name or None


_forced = _from_environment()
