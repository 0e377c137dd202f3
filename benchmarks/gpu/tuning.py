"""Blocks of attention: the present ones and those most like them, for the kernels and head dims that models use."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from benchmarks.gpu import rows
from benchmarks.gpu.child import Item
from benchmarks.race import MAIN
from benchmarks.tune import Config, candidates, key_of, milliseconds, table_of

NEEDS_TRITON = True

COUNT = 8  # of candidates for a line of the tables
LINES = [("forward", 128), ("dkdv", 128), ("dq", 128), ("forward", 64), ("window_forward", 128), ("window_dkdv", 128)]
LINES += [("dkdv", 64), ("dq", 64)]


def timed(kernel: str, head_dim: int, config: Config, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    present = config == table_of(kernel)[key_of(kernel, head_dim, dtype)]
    line = {
        "kernel": kernel,
        "head_dim": head_dim,
        "dtype": str(dtype).removeprefix("torch."),
        "blocks": config,
        "present": present,
    }
    try:
        yield {**line, "ms": milliseconds(kernel, head_dim, dtype, config)}
    except (OutOfResources, CompilationError) as error:  # too large for this GPU or this Triton: an answer, too
        yield {**line, "reason": rows.one_line(error)}


def items() -> list[Item]:
    """The candidates of a line one after the other, present ones first."""
    return [
        Item(f"{kernel}, d {head_dim}, {config}", partial(timed, kernel, head_dim, config, MAIN))
        for kernel, head_dim in LINES
        for config in candidates(kernel, head_dim, MAIN, COUNT)
    ]
