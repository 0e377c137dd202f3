"""Eager and compiled torch beside memory-bound ops, flex_attention beside attention: slow to compile, and so late in a run."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch._functorch.config

from benchmarks import measure
from benchmarks.gpu import attention, memory
from benchmarks.gpu.child import Item
from benchmarks.race import BACKWARD, FORWARD, REHEARSED, Race

EAGER, COMPILED, FLEX = "torch eager", "torch.compile", "flex_attention compiled"


def rows(race: Any, op: str, which: str, implementation: str) -> Iterator[dict[str, Any]]:
    made: Race = race(op, which)
    if implementation in made.implementations:
        # A compiled backward that gives away what the forward kept could not differentiate the same graph again.
        torch._functorch.config.donated_buffer = which != BACKWARD
        yield measure.measured(made, implementation)


def items() -> list[Item]:
    """No compiled ones in a rehearsal, which has no GPU to compile for."""
    names = [EAGER] if REHEARSED else [EAGER, COMPILED]
    races = [(memory.race, op, names) for op in memory.OPS if "attention" not in op]
    races += [] if REHEARSED else [(attention.race, batch, [FLEX]) for batch in attention.BATCHES[:2]]
    return [
        Item(f"{op}, {which}, {name}", partial(rows, race, op, which, name))
        for race, op, names in races
        for which in (FORWARD, BACKWARD)
        for name in names
    ]
