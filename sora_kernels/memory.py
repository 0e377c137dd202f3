"""Where outputs live: torch's allocator, or, for large ones on a CPU, memory of earlier outputs.

A fresh CPU tensor of many megabytes costs more in page faults than a memory-bound kernel needs to fill it, so memory of large
outputs that nobody uses any more is kept for the next ones, as torch does on a GPU. The tensors are ordinary ones, except that
their storage cannot be resized in place. What is kept and what is in use are at most twice what was once in use at the same time,
and what is kept has a limit for each process:

- a quarter of the machine's memory (or of the container's), divided by the processes that torchrun started on the machine,
- at most 64 MiB in a child process that lives for another one, such as a DataLoader's worker,
- or as many MiB as the environment variable `SORA_KERNELS_CACHE_MB` says; 0 keeps nothing.

A training step frees all that it held for its backward at once and
asks for it again: what the limit does not let it keep costs page faults in every step.
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.utils.data import get_worker_info

from ._torch_private import transforms_active
from .checks import fail

__all__ = ["cache_limit", "cached_bytes", "empty_cache"]  # what users call

LARGE = 4 << 20  # bytes; below, malloc keeps memory by itself
_OF_A_WORKER = 64 << 20
# Where a container finds how many bytes it may use, "max" for no limit: cgroup 2 and 1.
_LIMIT_FILES = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def _cpu() -> ModuleType | None:
    """Module _cpu, its limit set; None where it cannot be imported (`python -m sora_kernels.info` says why)."""
    return _cpu_of(os.getpid())


@functools.cache
def _cpu_of(process: int) -> ModuleType | None:
    """Once for each process: one that was forked sets a limit of its own."""
    try:
        module = importlib.import_module("._cpu", __package__)
    except ImportError as error:
        if "SORA_KERNELS_" in str(error):  # a wrong setting, which nothing may hide
            raise ValueError(str(error)) from None
        return None
    module.set_cache_limit(cache_limit())
    return module


def cache_limit() -> int:
    """The most bytes that are kept.

    Raises:
        ValueError: SORA_KERNELS_CACHE_MB is not a whole number of at least 0, or torchrun's LOCAL_WORLD_SIZE not one of at least 1.
    """
    wanted = _whole_number("SORA_KERNELS_CACHE_MB", "MiB", at_least=0)
    if wanted is not None:
        return min(wanted << 20, _machine_bytes())
    share = _machine_bytes() // 4 // (_whole_number("LOCAL_WORLD_SIZE", "processes", at_least=1) or 1)
    return min(share, _OF_A_WORKER) if _is_worker() else share


def _whole_number(variable: str, unit: str, at_least: int) -> int | None:
    text = os.environ.get(variable)
    if not text:
        return None
    if not text.isdecimal() or int(text) < at_least:
        fail("sora_kernels", variable, f"a whole number of {unit} of at least {at_least}", repr(text))
    return int(text)


def _is_worker() -> bool:
    """Whether this process lives for another one: there may be many, and what they make is handed over."""
    return get_worker_info() is not None or multiprocessing.current_process().daemon


def _machine_bytes() -> int:
    """The machine's memory, or the container's."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    allowed = [file.read_text().strip() for file in _LIMIT_FILES if file.is_file()]
    return min([installed, *(int(text) for text in allowed if text.isdecimal())])


def cached_bytes() -> int:
    """Bytes kept at the moment."""
    module = _cpu()
    return 0 if module is None else module.cached_bytes()


def empty_cache() -> None:
    """Gives all memory that is kept back to the system."""
    if module := _cpu():
        module.empty_cache()


def empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    """An uninitialised contiguous tensor of `like`'s dtype and device."""
    if _is_plain(like) and torch.Size(shape).numel() * like.element_size() >= LARGE and (module := _eager_cpu()):
        return module.empty(like, shape)
    return like.new_empty(shape)


def empty_like(x: Tensor) -> Tensor:
    """An uninitialised contiguous tensor, whatever the strides of x (torch.empty_like would keep those)."""
    if _is_plain(x) and x.nbytes >= LARGE and (module := _eager_cpu()):
        return module.empty(x, x.shape)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _eager_cpu() -> ModuleType | None:
    """Module _cpu, but where torch.func transforms: its tensors have no memory of their own."""
    return None if transforms_active() else _cpu()


def _is_plain(x: Tensor) -> bool:
    """On the CPU, and nothing that traces, transforms or stands for others: those know best how to make one of theirs."""
    return x.is_cpu and (type(x) is Tensor or type(x) is nn.Parameter)
