"""How large the attention kernels' blocks are: fixed tables per architecture, head dim and dtype, so that no call tunes itself.

`python -m benchmarks.tune` measures candidates on the GPU at hand and prints its table.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .common import OPTIONS

# (queries, keys, warps, stages) by kernel, architecture, and (head dim up to this, bytes of an element). Not tuned on a GPU yet:
# for 2-byte elements large blocks whose operands fit in shared memory and that spill nothing, but for 256 channels on sm90 and
# sm100, where blocks without spills would be too small for their matrix units (`python -m sora_kernels.report`).
Table = dict[tuple[int, int], tuple[int, int, int, int]]
CONFIGS: dict[str, dict[str, Table]] = {
    "forward": {
        "sm80": {
            (64, 2): (128, 128, 8, 3), (128, 2): (128, 64, 8, 2), (256, 2): (64, 32, 8, 2),
            (64, 4): (64, 32, 8, 2), (128, 4): (32, 32, 8, 2), (256, 4): (32, 16, 8, 1),
        },
        "sm90": {
            (64, 2): (128, 128, 8, 3), (96, 2): (128, 64, 8, 3), (128, 2): (128, 128, 8, 2), (256, 2): (128, 64, 8, 2),
            (64, 4): (64, 32, 8, 2), (128, 4): (32, 32, 8, 2), (256, 4): (32, 16, 8, 1),
        },
        "sm100": {
            (64, 2): (128, 128, 8, 3), (128, 2): (128, 64, 8, 3), (256, 2): (64, 64, 8, 2),
            (64, 4): (64, 32, 8, 2), (128, 4): (32, 32, 8, 2), (256, 4): (32, 16, 8, 1),
        },
        "gfx942": {
            (64, 2): (128, 64, 8, 2), (128, 2): (64, 64, 4, 1), (256, 2): (64, 32, 4, 1),
            (64, 4): (64, 64, 8, 1), (128, 4): (64, 32, 8, 1), (256, 4): (32, 16, 8, 1),
        },
    },
    "dq": {
        "sm80": {
            (64, 2): (128, 64, 8, 2), (128, 2): (64, 64, 8, 2), (256, 2): (32, 32, 8, 1),
            (64, 4): (32, 32, 8, 1), (128, 4): (32, 16, 8, 1), (256, 4): (16, 16, 8, 1),
        },
        "sm90": {
            (64, 2): (128, 64, 8, 2), (128, 2): (128, 64, 8, 2), (256, 2): (64, 32, 8, 1),
            (64, 4): (32, 32, 8, 1), (128, 4): (32, 16, 8, 1), (256, 4): (16, 16, 8, 1),
        },
        "sm100": {
            (64, 2): (128, 64, 8, 2), (128, 2): (128, 64, 8, 2), (256, 2): (64, 32, 8, 1),
            (64, 4): (32, 32, 8, 1), (128, 4): (32, 16, 8, 1), (256, 4): (16, 16, 8, 1),
        },
        "gfx942": {
            (64, 2): (64, 64, 4, 1), (128, 2): (64, 32, 4, 1), (256, 2): (32, 16, 4, 1),
            (64, 4): (64, 32, 8, 1), (128, 4): (32, 32, 8, 1), (256, 4): (16, 16, 8, 1),
        },
    },
    "dkdv": {
        "sm80": {
            (64, 2): (64, 128, 8, 2), (128, 2): (32, 64, 8, 2), (256, 2): (16, 32, 8, 1),
            (64, 4): (32, 32, 8, 1), (128, 4): (16, 32, 8, 1), (256, 4): (16, 16, 8, 1),
        },
        "sm90": {
            (64, 2): (64, 128, 8, 2), (128, 2): (32, 128, 8, 2), (256, 2): (32, 64, 8, 1),
            (64, 4): (32, 32, 8, 1), (128, 4): (16, 32, 8, 1), (256, 4): (16, 16, 8, 1),
        },
        "sm100": {
            (64, 2): (64, 128, 8, 2), (128, 2): (64, 128, 8, 2), (256, 2): (32, 64, 8, 1),
            (64, 4): (32, 32, 8, 1), (128, 4): (16, 32, 8, 1), (256, 4): (16, 16, 8, 1),
        },
        "gfx942": {
            (64, 2): (32, 64, 4, 2), (128, 2): (32, 64, 4, 1), (256, 2): (16, 32, 4, 1),
            (64, 4): (32, 64, 8, 1), (128, 4): (32, 32, 8, 1), (256, 4): (16, 16, 8, 1),
        },
    },
    # Windows: gathered rows need registers for their addresses.
    "window_forward": {
        "sm80": {
            (64, 2): (128, 64, 8, 2), (128, 2): (64, 64, 8, 2), (256, 2): (64, 32, 8, 2),
            (64, 4): (64, 32, 8, 2), (128, 4): (32, 32, 8, 1), (256, 4): (32, 16, 8, 1),
        },
        "sm90": {
            (64, 2): (128, 64, 8, 2), (128, 2): (128, 64, 8, 2), (256, 2): (64, 64, 8, 2),
            (64, 4): (64, 32, 8, 2), (128, 4): (32, 32, 8, 1), (256, 4): (32, 16, 8, 1),
        },
        "sm100": {
            (64, 2): (128, 64, 8, 2), (128, 2): (128, 64, 8, 2), (256, 2): (64, 64, 8, 2),
            (64, 4): (64, 32, 8, 2), (128, 4): (32, 32, 8, 1), (256, 4): (32, 16, 8, 1),
        },
        "gfx942": {
            (64, 2): (128, 64, 4, 2), (128, 2): (64, 64, 4, 1), (256, 2): (64, 32, 4, 1),
            (64, 4): (64, 32, 8, 1), (128, 4): (32, 32, 8, 1), (256, 4): (32, 16, 8, 1),
        },
    },
    "window_dq": {
        "sm80": {
            (64, 2): (128, 64, 8, 2), (128, 2): (64, 64, 8, 2), (256, 2): (32, 32, 8, 1),
            (64, 4): (32, 32, 8, 1), (128, 4): (32, 16, 8, 1), (256, 4): (16, 16, 8, 1),
        },
        "sm90": {
            (64, 2): (128, 64, 8, 2), (128, 2): (64, 32, 4, 1), (256, 2): (32, 32, 8, 1),
            (64, 4): (32, 32, 8, 1), (128, 4): (32, 16, 8, 1), (256, 4): (16, 16, 8, 1),
        },
        "sm100": {
            (64, 2): (64, 64, 4, 2), (128, 2): (64, 64, 8, 1), (256, 2): (32, 32, 8, 1),
            (64, 4): (32, 32, 8, 1), (128, 4): (32, 16, 8, 1), (256, 4): (16, 16, 8, 1),
        },
        "gfx942": {
            (64, 2): (64, 64, 4, 1), (128, 2): (64, 32, 4, 1), (256, 2): (32, 16, 4, 1),
            (64, 4): (32, 32, 8, 1), (128, 4): (32, 16, 8, 1), (256, 4): (16, 16, 8, 1),
        },
    },
    "window_dkdv": {
        "sm80": {
            (64, 2): (32, 128, 8, 2), (128, 2): (32, 64, 8, 1), (256, 2): (16, 32, 8, 1),
            (64, 4): (32, 32, 8, 1), (128, 4): (16, 32, 8, 1), (256, 4): (16, 16, 8, 1),
        },
        "sm90": {
            (64, 2): (32, 128, 8, 2), (128, 2): (32, 128, 8, 1), (256, 2): (32, 64, 8, 1),
            (64, 4): (32, 32, 8, 1), (128, 4): (16, 32, 8, 1), (256, 4): (16, 16, 8, 1),
        },
        "sm100": {
            (64, 2): (64, 128, 8, 1), (128, 2): (32, 128, 8, 1), (256, 2): (32, 64, 8, 1),
            (64, 4): (32, 32, 8, 1), (128, 4): (16, 32, 8, 1), (256, 4): (16, 16, 8, 1),
        },
        "gfx942": {
            (64, 2): (32, 64, 4, 1), (128, 2): (32, 64, 4, 1), (256, 2): (16, 32, 4, 1),
            (64, 4): (32, 32, 8, 1), (128, 4): (16, 32, 8, 1), (256, 4): (16, 16, 8, 1),
        },
    },
}  # fmt: skip

_forced: str | None = None


def architecture(device: torch.device) -> str:
    """The name in the tables of the architecture that stands for this device's."""
    if _forced is not None:
        return _forced
    return "interpreter" if device.type == "cpu" else _of_gpu(device.index)


@functools.cache
def _of_gpu(index: int) -> str:
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(index)
    # Compute capability 12 has tensor cores and shared memory like 8.9's.
    return {9: "sm90", 10: "sm100", 11: "sm100"}.get(major, "sm80")


def num_multiprocessors(device: torch.device) -> int:
    return 8 if device.type == "cpu" else _multiprocessors_of(device.index)


@functools.cache
def _multiprocessors_of(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


@contextmanager
def use_architecture(name: str) -> Iterator[None]:
    """Takes the configurations of this architecture, whatever the device."""
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def attention_config(
    kernel: str, device: torch.device, head_dim: int, itemsize: int, *, plain: bool = True, windowed: bool = False
) -> dict[str, int]:
    """BLOCK_M, BLOCK_N and launch options of an attention kernel.

    Args:
        plain: scores are products and nothing else; a softcap, a bias or ALiBi needs registers, which smaller blocks leave.
        windowed: all blocks compute masks, for which the largest block of keys leaves none either.
    """
    arch = architecture(device)
    if arch == "interpreter":
        return {"BLOCK_M": 64, "BLOCK_N": 64}
    table = CONFIGS[kernel][arch]
    bound = min(d for d, size in table if d >= head_dim and size == itemsize)
    block_m, block_n, warps, stages = table[bound, itemsize]
    if not plain:
        block_m, block_n, stages = max(block_m // 2, 16), max(block_n // 2, 16), 1
    elif windowed and kernel == "forward":
        block_n = min(block_n, 64)
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages, **OPTIONS}
