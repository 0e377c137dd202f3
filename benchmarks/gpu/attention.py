"""The GPU's ceilings, and attention alone beside them: forward and backward, candidates for its blocks, torch's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch

from benchmarks import bench_attention, measure
from benchmarks.gpu.child import Item, measured
from benchmarks.race import BACKWARD, DEVICE, FORWARD, MAIN, OURS, REHEARSED, Race
from benchmarks.tune import blocks, named
from sora_kernels import flash, use_backend

NEEDS_TRITON = True

BATCHES = ["16k", "mixed, 4 of each, d 128", "16k, d 64", "mixed, 16 of each"]
PEERS = ["torch varlen_attn", "torch varlen_attn, cuDNN", "SDPA per sample, cuDNN"]
# The kernels that `prefer("fastest")` asks, behind this package's function: what its table of speeds is made of.
FASTEST = {} if REHEARSED else {f"{name}, forced": name for name in ("hopper", *flash.FOREIGN)}


def ceilings() -> Iterator[dict[str, Any]]:
    """The bandwidth of a copy, reads and writes counted, and the rate of a large product, on random numbers."""
    size = 1 << (22 if REHEARSED else 31)
    source = torch.empty(size // 4, device=DEVICE, dtype=torch.int32).random_()
    target = torch.empty_like(source)
    yield ceiling("copy", "gbps", 2e-9 * size, lambda: target.copy_(source))
    n = 256 if REHEARSED else 8192
    a, b = (torch.randn(n, n, device=DEVICE).to(MAIN) for _ in range(2))
    yield ceiling(f"matmul {n}", "gflops", 2e-9 * n**3, lambda: a @ b)


def ceiling(name: str, unit: str, work: float, function: Any) -> dict[str, Any]:
    host = measure.host_seconds(function)
    seconds = [measure.CLOCK.on_gpu(function, host) for _ in range(2 if REHEARSED else 20)]
    ms = measure.percentiles(seconds)
    return {"ceiling": name, f"useful_{unit}": work / (1e-3 * ms[1]), "ms": ms}


@lru_cache(maxsize=1)
def race(batch: str, which: str) -> Race:
    """With rows of FASTEST, and of the named candidates for the forward's blocks: (queries, keys, warps, stages)."""
    made = bench_attention.attention(MAIN, which, batch=batch)
    for title, name in FASTEST.items():
        made.implementations[title] = replace(made.implementations[OURS], context=partial(use_backend, name))
    if which == FORWARD:
        head_dim = bench_attention.BATCHES[batch][2]
        for candidate in named("forward", head_dim, MAIN):
            context = partial(blocks, "forward", head_dim, MAIN, candidate)
            made.implementations[f"{OURS} {candidate}"] = replace(made.implementations[OURS], context=context)
    return made


def measure_row(batch: str, which: str, implementation: str) -> Iterator[dict[str, Any]]:
    yield measured(race(batch, which), implementation)


def items() -> list[Item]:
    found = [Item("ceilings", ceilings)]
    for batch in BATCHES:
        head_dim = bench_attention.BATCHES[batch][2]
        candidates = [f"{OURS} {candidate}" for candidate in named("forward", head_dim, MAIN)]
        for which, names in ((FORWARD, [OURS, *candidates, *PEERS, *FASTEST]), (BACKWARD, [OURS, *PEERS, *FASTEST])):
            found += [Item(f"{batch}, {which}, {name}", partial(measure_row, batch, which, name)) for name in names]
    return found
