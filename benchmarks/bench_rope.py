"""3D RoPE, alone and behind QK-norm, against diffusers' way in eager and compiled torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

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
from sora_kernels.rope import default_axes_dim, qk_norm_rope_3d, rope_3d


def rope_tables(layout: PackedLayout, head_dim: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """cos and sin [N, 1, head_dim/2], which peers compute once per shape."""
    parts = []
    for position, channels in zip(layout.positions().double().unbind(1), default_axes_dim(head_dim), strict=True):
        frequency = theta ** (-torch.arange(channels // 2, dtype=torch.float64, device=layout.device) / (channels // 2))
        parts.append(torch.outer(position, frequency))
    angles = torch.cat(parts, dim=1)[:, None]
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of interleaved pairs in float32, as the video models of diffusers apply it."""
    u, v = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((u * cos - v * sin, u * sin + v * cos), dim=-1).flatten(-2).type_as(x)


def norm_rotate(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    q, k = (F.rms_norm(x, x.shape[-1:], weight, eps=1e-6) for x, weight in ((q, q_weight), (k, k_weight)))
    return rotate(q, cos, sin), rotate(k, cos, sin)


ROPE = ["rope_3d", "qk_norm_rope_3d"]


def rope(op: str, dtype: torch.dtype, which: str, *, layout: PackedLayout = LAYOUT) -> Race:
    """One of the two ops."""
    torch.manual_seed(0)
    backward = which != FORWARD
    cos, sin = rope_tables(layout, HEAD_DIM)
    x, y, dx, dy = (randn(layout.num_tokens, HEADS, HEAD_DIM, dtype=dtype, grad=backward) for _ in range(4))
    weights = [randn(HEAD_DIM, dtype=dtype, grad=backward) for _ in range(2)]
    norm = op == "qk_norm_rope_3d"
    inputs, cotangents, peer = ([x, y, *weights], [dx, dy], norm_rotate) if norm else ([x], [dx], rotate)

    def ours(*xs: Tensor) -> Any:
        return qk_norm_rope_3d(*xs, layout) if norm else rope_3d(*xs, layout)

    def plain(*xs: Tensor) -> Any:
        return peer(*xs, cos, sin)

    # Forward: x in, y out. Backward: dy in, dx out; the norm needs x again.
    work = of_pass(which, *((4, 6) if norm else (2, 2))) * gigabytes(x)
    rows = {
        OURS: Implementation(ours),
        "torch eager": Implementation(plain),
        "torch.compile": Implementation(compiled(plain)),
        "copy": copied(work),
    }
    return Race(op, dtype, which, {"gbps": work}, inputs, cotangents, plain, rows)


@pytest.mark.parametrize(("which", "implementation"), passes(OURS, "torch eager", "torch.compile"), ids=IDS.get)
@pytest.mark.parametrize("op", ROPE)
@pytest.mark.parametrize("dtype", [torch.bfloat16] if ON_GPU else [torch.float32, torch.bfloat16], ids=str)
def test_rope(measure, implementation, dtype, op, which):
    measure(implementation, rope, op, dtype, which)
