"""RoPE from given tables, alone and behind a norm, against diffusers' way in eager and compiled torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench_rope import rope_tables, rotate
from benchmarks.race import (
    FORWARD,
    HEAD_DIM,
    HEADS,
    IDS,
    LAYOUT,
    ON_GPU,
    OURS,
    Implementation,
    Race,
    compiled,
    copied,
    gigabytes,
    of_pass,
    passes,
    randn,
)
from sora_kernels.layout import PackedLayout
from sora_kernels.norm_rope import apply_rope, norm_rope


def rms_rotate(x: Tensor, weight: Tensor, *, cos: Tensor, sin: Tensor) -> Tensor:
    return rotate(F.rms_norm(x, x.shape[-1:], weight, eps=1e-6), cos, sin)


def layer_rotate(x: Tensor, weight: Tensor, bias: Tensor, *, cos: Tensor, sin: Tensor) -> Tensor:
    return rotate(F.layer_norm(x, x.shape[-1:], weight, bias, eps=1e-6), cos, sin)


def rms(x: Tensor, weight: Tensor, *, cos: Tensor, sin: Tensor) -> Tensor:
    return norm_rope(x, cos, sin, weight=weight)


def layer(x: Tensor, weight: Tensor, bias: Tensor, *, cos: Tensor, sin: Tensor) -> Tensor:
    return norm_rope(x, cos, sin, norm="layer", weight=weight, bias=bias)


# Ours, the peer, and how many parameters they take.
NORM_ROPE: dict[str, tuple[Callable[..., Any], Callable[..., Any], int]] = {
    "apply_rope": (apply_rope, rotate, 0),
    "norm_rope": (rms, rms_rotate, 1),
    "norm_rope, LayerNorm": (layer, layer_rotate, 2),
}


def given_rope(op: str, dtype: torch.dtype, which: str, *, layout: PackedLayout = LAYOUT) -> Race:
    """One of the ops."""
    torch.manual_seed(0)
    backward = which != FORWARD
    cos, sin = rope_tables(layout, HEAD_DIM)
    ours, peer, parameters = NORM_ROPE[op]
    x, dx = (randn(layout.num_tokens, HEADS, HEAD_DIM, dtype=dtype, grad=backward) for _ in range(2))
    inputs = [x, *(randn(HEAD_DIM, dtype=dtype, grad=backward) for _ in range(parameters))]
    plain = partial(peer, cos=cos, sin=sin)
    # Forward: x in, y out. Backward: dy in, dx out; the norm needs x again. Tables are read once in each.
    work = of_pass(which, *((2, 3) if parameters else (2, 2))) * gigabytes(x) + of_pass(which, 1, 1) * gigabytes(cos, sin)
    rows = {
        OURS: Implementation(partial(ours, cos=cos[:, 0], sin=sin[:, 0])),
        "torch eager": Implementation(plain),
        "torch.compile": Implementation(compiled(plain)),
        "copy": copied(work),
    }
    return Race(op, dtype, which, {"gbps": work}, inputs, [dx], plain, rows)


@pytest.mark.parametrize(("which", "implementation"), passes(OURS, "torch eager", "torch.compile"), ids=IDS.get)
@pytest.mark.parametrize("op", NORM_ROPE)
@pytest.mark.parametrize("dtype", [torch.bfloat16] if ON_GPU else [torch.float32, torch.bfloat16], ids=str)
def test_norm_rope(measure, implementation, dtype, op, which):
    measure(implementation, given_rope, op, dtype, which)
