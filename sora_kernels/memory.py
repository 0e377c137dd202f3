"""Where outputs live: torch's allocator, or, for large ones on a CPU, memory of earlier outputs.

A fresh CPU tensor of many megabytes costs more in page faults than a memory-bound kernel needs to fill it, so memory of large
outputs that nobody uses any more is kept for the next ones, as torch does on a GPU. The tensors are ordinary ones, except that
their storage cannot be resized in place. What is kept and what is in use are at most twice what was once in use at the same time,
and what is kept is at most a quarter of the machine's memory (or of the container's), or as many MiB as the environment variable
`SORA_KERNELS_CACHE_MB` says, for each process; 0 keeps nothing. A training step frees all that it held for its backward at once and
asks for it again: what the limit does not let it keep costs page faults in every step.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from ._torch_private import transforms_active

__all__ = ["cache_limit", "cached_bytes", "empty_cache"]  # what users call

LARGE = 4 << 20  # bytes; below, malloc keeps memory by itself
# Where a container finds how many bytes it may use, "max" for no limit: cgroup 2 and 1.
_LIMIT_FILES = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@functools.cache
def _cpu() -> ModuleType | None:
    """Module _cpu, its limit set; None where it cannot be imported (`python -m sora_kernels.info` says why)."""
    try:
        module = importlib.import_module("._cpu", __package__)
    except ImportError:
        return None
    module.set_cache_limit(cache_limit())
    return module


def cache_limit() -> int:
    """The most bytes that are kept.

    Raises:
        ValueError: SORA_KERNELS_CACHE_MB is not a whole number of at least 0.
    """
    text = os.environ.get("SORA_KERNELS_CACHE_MB")
    if not text:
        return _machine_bytes() // 4
    if not text.isdecimal():
        raise ValueError(f"sora_kernels: SORA_KERNELS_CACHE_MB: expected a whole number of MiB of at least 0, got {text!r}")
    return min(int(text) << 20, _machine_bytes())


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
