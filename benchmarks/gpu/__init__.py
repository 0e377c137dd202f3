"""What needs a GPU, in one command and without network: python -m benchmarks.gpu OUT (__main__.py).

The driver and all that it imports need no torch: whatever is wrong with a machine's torch, it says so, and what can run runs.
"""

from __future__ import annotations

import os

# The variable that asks for a simulated GPU by its architecture. Of each: multiprocessors, shared memory of a block and of a
# multiprocessor in bytes, as of an A100, an H100 and a B200.
SIMULATED = "SIMULATED_GPU"
GPUS = {"sm80": (108, 166912, 167936), "sm90": (132, 232448, 233472), "sm100": (148, 232448, 233472)}
NAME = "simulated GPU"


def simulated_gpu() -> str | None:
    """The architecture of the simulated GPU that is asked for, if one is."""
    return os.environ.get(SIMULATED) or None


def simulate(arch: str) -> None:
    """This process' children see a simulated GPU, and no other."""
    os.environ |= {SIMULATED: arch, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
