"""Which table of configs.py a GPU takes, or the reason why none fits it.

Tables exist for architectures that the kernels were compiled for. Others are refused and not guessed at: without tensor cores or
with less shared memory, kernels fail only when they are launched, or spill kilobytes and take minutes to compile.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton

# The table by the major compute capability. Capability 12 has matrix instructions and shared memory like 8.6's and 8.9's.
NVIDIA = {8: "sm80", 9: "sm90", 10: "sm100", 11: "sm100", 12: "sm80"}
# The table by how an AMD architecture's name begins. gfx1250, for one, is no RDNA.
AMD = {"gfx90a": "gfx942", "gfx942": "gfx942", "gfx950": "gfx942", "gfx110": "gfx1100", "gfx115": "gfx1100", "gfx120": "gfx1100"}
WARP_SIZE = {"gfx942": 64, "gfx1100": 32}
# The first Triton known to compile for a major capability, where it is not the oldest that is supported.
NEEDS_TRITON = {11: "3.9"}
# The most bytes of shared memory that a block of any kernel takes under each table of NVIDIA's, with Triton 3.6 and 3.9 alike: all
# head dims and dtypes (`tests/test_report.py` compiles them).
SHARED_MEMORY = {"sm80": 81920, "sm90": 196608, "sm100": 164672}


class Fit(NamedTuple):
    """A table's name, or why there is none."""

    table: str | None
    reason: str | None = None


def nvidia(capability: tuple[int, int], shared_memory: int, triton_version: str = triton.__version__) -> Fit:
    """Of a GPU with this compute capability and at most these bytes of shared memory for a block."""
    major, minor = capability
    card = f"this GPU has {major}.{minor}"
    if major < min(NVIDIA):
        return Fit(None, f"needs compute capability {min(NVIDIA)}.0 or above; {card}")
    if major not in NVIDIA:
        return Fit(None, f"was compiled for compute capabilities {min(NVIDIA)}.0 to {max(NVIDIA)}.x and for nothing later; {card}")
    needs = NEEDS_TRITON.get(major, "0")
    if tuple(map(int, triton_version.split(".")[:2])) < tuple(map(int, needs.split("."))):
        return Fit(None, f"needs Triton {needs} or above for compute capability {major}.{minor}; this is Triton {triton_version}")
    table = NVIDIA[major]
    if shared_memory < SHARED_MEMORY[table]:
        needed, found = SHARED_MEMORY[table] / 1024, shared_memory / 1024
        return Fit(None, f"needs {needed:.4g} KiB of shared memory a block (table {table}); this GPU has {found:.4g} KiB")
    return Fit(table)


def amd(name: str, warp_size: int) -> Fit:
    """Of a GPU by its gcnArchName, such as "gfx942:sramecc+:xnack-". All have 64 KiB of shared memory; tests hold kernels to it."""
    arch = name.partition(":")[0]
    table = next((table for prefix, table in AMD.items() if arch.startswith(prefix)), None)
    if table is None:
        return Fit(None, f"was compiled for {', '.join(f'{prefix}*' for prefix in AMD)} and for no other; this GPU is {arch}")
    if warp_size != WARP_SIZE[table]:
        return Fit(None, f"needs warps of {WARP_SIZE[table]} threads on {arch}; this GPU's have {warp_size}")
    return Fit(table)


@functools.cache
def fit(index: int) -> Fit:
    """Of the GPU with this index."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return amd(properties.gcnArchName, properties.warp_size)
    shared_memory = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # the stubs lack it
    return nvidia(torch.cuda.get_device_capability(index), shared_memory)
