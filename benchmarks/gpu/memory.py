"""Memory-bound ops, patches and windows: module _cuda against Triton against a copy of as many bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

from benchmarks.bench_adaln import ADALN, adaln
from benchmarks.bench_attention import WINDOWS, window_attention
from benchmarks.bench_bias_gelu import activation
from benchmarks.bench_patch_embed import patch_embedding, patches
from benchmarks.bench_rope import ROPE, rope
from benchmarks.gpu.child import Item, measured
from benchmarks.race import BACKWARD, FORWARD, MAIN, OURS, Race
from sora_kernels.backends import BACKENDS, use_backend

BY_TRITON, NO_WINDOW = f"{OURS}, Triton", f"{OURS}, no window"
OPS: dict[str, Callable[[str], Race]] = {
    **{op: partial(adaln, op, MAIN) for op in ADALN},
    "bias_gelu": partial(activation, MAIN),
    **{op: partial(rope, op, MAIN) for op in ROPE},
    "patchify_3d": partial(patches, MAIN, cut=True),
    "unpatchify_3d": partial(patches, MAIN, cut=False),
    "patch_embed_3d": partial(patch_embedding, MAIN),
    "window attention": partial(window_attention, MAIN, case=next(iter(WINDOWS))),
}


@lru_cache(maxsize=1)
def race(op: str, which: str) -> Race:
    made = OPS[op](which)
    made.implementations[BY_TRITON] = replace(made.implementations[OURS], context=partial(use_backend, "triton"))
    return made


def measure_row(op: str, which: str, implementation: str) -> Iterator[dict[str, Any]]:
    yield measured(race(op, which), implementation)


def implementations(op: str) -> list[str]:
    if op == "window attention":
        return [OURS, NO_WINDOW]
    function = op if op.endswith("ify_3d") or op == "rope_3d" else f"{op}_forward"
    # Triton's beside ours, where it can run and ours is not Triton's already.
    twice = all(BACKENDS[name].unavailable(function, "cuda", MAIN) is None for name in ("cuda", "triton"))
    return [OURS, *([BY_TRITON] if twice else []), "copy"]


def items() -> list[Item]:
    return [
        Item(f"{op}, {which}, {name}", partial(measure_row, op, which, name))
        for op in OPS
        for which in (FORWARD, BACKWARD)
        for name in implementations(op)
    ]
