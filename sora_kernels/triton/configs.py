"""How large the attention kernels' blocks are: fixed tables per architecture, head dim and dtype, so that no call tunes itself.

`python -m benchmarks.tune` measures candidates on the GPU at hand and prints its table.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from triton import knobs

from .common import OPTIONS
from .devices import fit

Config = tuple[int, int, int, int]  # queries, keys, warps, stages
Table = dict[tuple[int, int], Config]  # by (head dim up to this, bytes of an element)
# By kernel and architecture. Not tuned on a GPU yet: for 2-byte elements large blocks whose operands fit in shared memory and that
# spill next to nothing, which depends on Triton's version (docs/performance.md). More spill 256 channels on sm90 and sm100, where
# smaller blocks would not fill the matrix units, and the backward on gfx1100: its matrix instructions want whole rows of both
# operands in registers, twice.
CONFIGS: dict[str, dict[str, Table]] = {
    "forward": {
        "sm80": {
            (64, 2): (128, 64, 8, 3), (128, 2): (128, 64, 8, 2), (256, 2): (64, 32, 8, 2),
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
        "gfx1100": {
            (64, 2): (128, 32, 8, 1), (128, 2): (64, 16, 8, 1), (256, 2): (16, 16, 8, 1),
            (64, 4): (32, 32, 16, 1), (128, 4): (32, 16, 16, 1), (256, 4): (16, 16, 16, 1),
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
        "gfx1100": {
            (64, 2): (64, 32, 8, 1), (128, 2): (32, 16, 8, 1), (256, 2): (32, 16, 16, 1),
            (64, 4): (32, 16, 16, 1), (128, 4): (16, 16, 16, 1), (256, 4): (16, 16, 16, 1),
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
        "gfx1100": {
            (64, 2): (16, 64, 8, 1), (128, 2): (16, 32, 8, 1), (256, 2): (16, 32, 16, 1),
            (64, 4): (16, 32, 16, 1), (128, 4): (16, 16, 16, 1), (256, 4): (16, 16, 16, 1),
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
            (64, 2): (128, 64, 8, 2), (128, 2): (128, 64, 8, 2), (256, 2): (64, 64, 8, 1),
            (64, 4): (64, 32, 8, 2), (128, 4): (32, 32, 8, 1), (256, 4): (32, 16, 8, 1),
        },
        "gfx942": {
            (64, 2): (128, 64, 4, 2), (128, 2): (64, 64, 4, 1), (256, 2): (64, 32, 4, 1),
            (64, 4): (64, 32, 8, 1), (128, 4): (32, 32, 8, 1), (256, 4): (32, 16, 8, 1),
        },
        "gfx1100": {
            (64, 2): (128, 32, 8, 1), (128, 2): (64, 16, 8, 1), (256, 2): (16, 16, 8, 1),
            (64, 4): (32, 16, 16, 1), (128, 4): (32, 16, 16, 1), (256, 4): (16, 16, 16, 1),
        },
    },
    "window_dq": {
        "sm80": {
            (64, 2): (128, 32, 8, 2), (128, 2): (64, 64, 8, 2), (256, 2): (32, 32, 8, 1),
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
        "gfx1100": {
            (64, 2): (64, 32, 8, 1), (128, 2): (32, 16, 8, 1), (256, 2): (32, 16, 16, 1),
            (64, 4): (32, 16, 16, 1), (128, 4): (16, 16, 16, 1), (256, 4): (16, 16, 16, 1),
        },
    },
    "window_dkdv": {
        "sm80": {
            (64, 2): (16, 128, 8, 2), (128, 2): (32, 64, 8, 1), (256, 2): (16, 32, 8, 1),
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
        "gfx1100": {
            (64, 2): (16, 32, 8, 1), (128, 2): (16, 32, 8, 1), (256, 2): (16, 32, 16, 1),
            (64, 4): (16, 32, 16, 1), (128, 4): (16, 16, 16, 1), (256, 4): (16, 16, 16, 1),
        },
    },
}  # fmt: skip
# int8 queries and keys: at most as many keys as share a scale. Not tuned either.
CONFIGS["int8_forward"] = {
    arch: {key: (queries, min(keys, 64), warps, stages) for key, (queries, keys, warps, stages) in table.items()}
    for arch, table in CONFIGS["forward"].items()
}

# What to measure first on a GPU, before the candidates that `benchmarks.tune` makes up. All keep the matrix units of their
# architecture. Registers, bytes spilled and KiB of shared memory, bfloat16, on Triton 3.6 and 3.9:
CANDIDATES: dict[tuple[str, str], dict[tuple[int, int], list[Config]]] = {
    ("forward", "sm90"): {
        (128, 2): [
            (128, 128, 8, 2),  # 255, 0, 160 and 254, 0, 160: the present one, which waits for all of K's copies before QK
            (128, 128, 8, 3),  # 255, 0, 224 and 255, 8, 224: copies have a whole iteration's time
            (64, 64, 4, 3),  # 230, 0, 112 and 220, 0, 112: two blocks a multiprocessor
        ],
        (64, 2): [
            (128, 128, 8, 3),  # 188, 0, 112 and 192, 0, 112: the present one
            (128, 64, 8, 3),  # 128, 0, 64 and 126, 0, 64
            (64, 64, 4, 3),  # 138, 0, 56 and 138, 0, 56
        ],
    },
    ("window_forward", "sm90"): {
        (128, 2): [
            (128, 64, 8, 2),  # 228, 0, 96 and 227, 0, 96: the present one
            (64, 64, 4, 2),  # 240, 0, 80 and 231, 0, 80: two blocks a multiprocessor; a query's share of the union of windows grows
        ],
    },
    ("window_dkdv", "sm90"): {
        (128, 2): [
            (32, 128, 8, 1),  # 255, 48, 80 and 247, 0, 80: the present one
            (16, 128, 8, 2),  # 248, 0, 80 and 242, 0, 80: spills on neither, but `wgmma` of 16 queries runs at half its rate
        ],
    },
}  # fmt: skip

_forced: str | None = None


def architecture(device: torch.device) -> str:
    """The name in the tables of the architecture that stands for this device's."""
    if _forced is not None:
        return _forced
    if device.type == "cpu":
        return "interpreter"
    table, reason = fit(device.index)
    if table is None:
        raise RuntimeError(f"sora_kernels: no blocks of attention for GPU {device.index}: Triton backend {reason}")
    return table


def unavailable() -> str | None:
    """Why no kernel here can run on the present GPU. None if they can, and where they are interpreted or only compiled."""
    if _forced is not None or knobs.runtime.interpret or not torch.cuda.is_available():
        return None
    return fit(torch.cuda.current_device()).reason


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
