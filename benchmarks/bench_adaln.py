"""adaLN with modulation rows per sample and per latent frame, and LayerNorm without any, against eager and compiled torch.

Neither quack (rmsnorm, layernorm) nor liger_kernel (LayerNorm, RMSNorm, FusedAddRMSNorm) is a peer: they scale by one weight for
all tokens and have no shift, scale and gate per row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.race import (
    FORWARD,
    IDS,
    LAYOUT,
    MAIN,
    OURS,
    WIDTH,
    Implementation,
    Race,
    Tensors,
    compiled,
    copied,
    gigabytes,
    of_pass,
    passes,
    randn,
)
from sora_kernels.adaln import gate_residual, gate_residual_layer_norm_modulate, layer_norm_modulate, norm_gate_residual
from sora_kernels.layout import PackedLayout

Spread = Callable[[Tensor], Tensor]  # rows [R, D] -> [N, D]


def modulate(x: Tensor, shift: Tensor, scale: Tensor, spread: Spread) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + spread(scale)) + spread(shift)


def gated(residual: Tensor, x: Tensor, gate: Tensor, spread: Spread) -> Tensor:
    return residual + spread(gate) * x


def gated_modulate(residual: Tensor, x: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, spread: Spread) -> Tensors:
    residual = gated(residual, x, gate, spread)
    return [residual, modulate(residual, shift, scale, spread)]


def gated_norm(residual: Tensor, x: Tensor, gate: Tensor, spread: Spread) -> Tensor:
    return residual + spread(gate.tanh()) * F.rms_norm(x, x.shape[-1:], eps=1e-6)


# our op; the same in torch; [N, D] inputs, [R, D] rows, outputs; [N, D] tensors that a backward must read or write
ADALN = {
    "layer_norm_modulate": (layer_norm_modulate, modulate, 1, 2, 1, 3),
    "gate_residual": (gate_residual, gated, 2, 1, 1, 3),
    "gate_residual_layer_norm_modulate": (gate_residual_layer_norm_modulate, gated_modulate, 2, 3, 2, 6),
    "norm_gate_residual": (partial(norm_gate_residual, tanh=True, norm="rms"), gated_norm, 2, 1, 1, 4),
}


def adaln(op: str, dtype: torch.dtype, which: str, *, per_frame: bool = False, layout: PackedLayout = LAYOUT) -> Race:
    """One of the four adaLN ops, with modulation rows per sample or per latent frame."""
    torch.manual_seed(0)
    backward = which != FORWARD
    ours, peer, num_inputs, num_rows, num_outputs, backward_tensors = ADALN[op]
    boundaries = layout.cu_frames if per_frame else layout.cu_seqlens
    lengths = boundaries.diff().tolist()
    row_of_token = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(layout.device)
    tokens = [randn(layout.num_tokens, WIDTH, dtype=dtype, grad=backward) for _ in range(num_inputs)]
    inputs = tokens + [randn(len(lengths), WIDTH, dtype=dtype, grad=backward) for _ in range(num_rows)]
    cotangents = [randn(layout.num_tokens, WIDTH, dtype=dtype) for _ in range(num_outputs)]

    def by_index(*xs: Tensor) -> Any:
        return peer(*xs, lambda rows: rows[row_of_token])

    def by_exact_index(*xs: Tensor) -> Any:  # on GPUs an index's backward adds token by token in its own dtype
        return peer(*xs, lambda rows: rows.float()[row_of_token].type_as(rows))

    def by_expand(*xs: Tensor) -> Any:
        return peer(*xs, lambda rows: torch.cat([row.expand(n, -1) for row, n in zip(rows, lengths, strict=True)]))

    work = of_pass(which, num_inputs + num_outputs, backward_tensors) * gigabytes(tokens[0])
    rows = {
        OURS: Implementation(lambda *xs: ours(*xs, boundaries)),
        "torch eager": Implementation(by_index),
        "torch.compile": Implementation(compiled(by_exact_index if backward else by_index)),
        "copy": copied(work),
    }
    if backward and not per_frame:  # few rows: a sum over slices compiles to less work than the index's scatter
        rows["torch.compile"] = Implementation(compiled(by_expand))
    name = f"{op}, rows per {'frame' if per_frame else 'sample'}"
    return Race(name, dtype, which, {"gbps": work}, inputs, cotangents, by_expand, rows)


def norm(dtype: torch.dtype, which: str, *, layout: PackedLayout = LAYOUT) -> Race:
    """LayerNorm with its own weight and bias."""
    torch.manual_seed(0)
    x, weight, bias = (
        randn(*shape, dtype=dtype, grad=which != FORWARD) for shape in ((layout.num_tokens, WIDTH), (WIDTH,), (WIDTH,))
    )

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps=1e-6)

    work = of_pass(which, 2, 3) * gigabytes(x)
    rows = {
        OURS: Implementation(lambda x, weight, bias: layer_norm_modulate(x, weight=weight, bias=bias)),
        "torch eager": Implementation(plain),
        "torch.compile": Implementation(compiled(plain)),
        "copy": copied(work),
    }
    return Race("layer_norm", dtype, which, {"gbps": work}, [x, weight, bias], [randn(*x.shape, dtype=dtype)], plain, rows)


@pytest.mark.parametrize(("which", "implementation"), passes(OURS, "torch eager", "torch.compile"), ids=IDS.get)
def test_layer_norm(measure, implementation, which):
    measure(implementation, norm, MAIN, which)


@pytest.mark.parametrize(("which", "implementation"), passes(OURS, "torch eager", "torch.compile"), ids=IDS.get)
@pytest.mark.parametrize("per_frame", [False, True], ids=["sample", "frame"])
@pytest.mark.parametrize("op", ADALN)
def test_adaln(measure, implementation, op, which, per_frame):
    measure(implementation, adaln, op, MAIN, which, per_frame=per_frame)
