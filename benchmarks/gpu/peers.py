"""Eager and compiled torch beside memory-bound ops, flex_attention beside attention: slow to compile, and so late in a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from benchmarks.gpu import attention, memory
from benchmarks.gpu.child import Item, measured
from benchmarks.race import BACKWARD, FORWARD, REHEARSED, Race

EAGER, COMPILED, FLEX = "torch eager", "torch.compile", "flex_attention compiled"


def measure_row(race: Callable[[str, str], Race], op: str, which: str, implementation: str) -> Iterator[dict[str, Any]]:
    made = race(op, which)
    if implementation in made.implementations:  # patches have no eager peer but einops
        yield measured(made, implementation)


def items() -> list[Item]:
    """No compiled ones in a rehearsal, which has no GPU to compile for."""
    names = [EAGER] if REHEARSED else [EAGER, COMPILED]
    races = [(memory.race, op, names) for op in memory.OPS if "attention" not in op]
    races += [] if REHEARSED else [(attention.race, batch, [FLEX]) for batch in attention.BATCHES[:2]]
    return [
        Item(f"{op}, {which}, {name}", partial(measure_row, race, op, which, name))
        for race, op, names in races
        for which in (FORWARD, BACKWARD)
        for name in names
    ]
