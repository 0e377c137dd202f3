"""Four kernels for Nsight Compute, which watches between start and stop of the profiler: each once, after it has run unwatched."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.bench_adaln import adaln
from benchmarks.bench_attention import attention
from benchmarks.bench_rope import rope
from benchmarks.gpu.child import Item
from benchmarks.race import BACKWARD, FORWARD, MAIN, OURS, Race

NEEDS_TRITON = True


def watched(make: Any) -> Iterator[dict[str, Any]]:
    race: Race = make()
    race.call(OURS)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    race.call(OURS)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    yield {"profiled": race.op, "pass": race.which}


def items() -> list[Item]:
    races = {
        "attention forward": partial(attention, MAIN, FORWARD, batch="16k"),
        "attention backward": partial(attention, MAIN, BACKWARD, batch="16k"),
        "adaLN forward": partial(adaln, "gate_residual_layer_norm_modulate", MAIN, FORWARD),
        "QK-norm and RoPE forward": partial(rope, "qk_norm_rope_3d", MAIN, FORWARD),
    }
    return [Item(name, partial(watched, make)) for name, make in races.items()]
