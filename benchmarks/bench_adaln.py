"""adaLN with modulation rows per sample and per latent frame, against eager and compiled torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.race import LAYOUT, MAIN, OURS, WIDTH, Implementation, Race, Tensors, compiled, copied, gigabytes, passes, randn
from sora_kernels.adaln import gate_residual, gate_residual_layer_norm_modulate, layer_norm_modulate

Spread = Callable[[Tensor], Tensor]  # rows [R, D] -> [N, D]


def modulate(x: Tensor, shift: Tensor, scale: Tensor, spread: Spread) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + spread(scale)) + spread(shift)


def gated(residual: Tensor, x: Tensor, gate: Tensor, spread: Spread) -> Tensor:
    return residual + spread(gate) * x


def gated_modulate(residual: Tensor, x: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, spread: Spread) -> Tensors:
    residual = gated(residual, x, gate, spread)
    return [residual, modulate(residual, shift, scale, spread)]


# our op; the same in torch; [N, D] inputs, [R, D] rows, outputs; [N, D] tensors that a backward must read or write
ADALN = {
    "layer_norm_modulate": (layer_norm_modulate, modulate, 1, 2, 1, 3),
    "gate_residual": (gate_residual, gated, 2, 1, 1, 3),
    "gate_residual_layer_norm_modulate": (gate_residual_layer_norm_modulate, gated_modulate, 2, 3, 2, 6),
}


def adaln(op: str, dtype: torch.dtype, backward: bool, *, per_frame: bool) -> Race:
    """One of the three adaLN ops, with modulation rows per sample or per latent frame."""
    torch.manual_seed(0)
    ours, peer, num_inputs, num_rows, num_outputs, backward_tensors = ADALN[op]
    boundaries = LAYOUT.cu_frames if per_frame else LAYOUT.cu_seqlens
    lengths = boundaries.diff().tolist()
    row_of_token = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(LAYOUT.device)
    tokens = [randn(LAYOUT.num_tokens, WIDTH, dtype=dtype, grad=backward) for _ in range(num_inputs)]
    inputs = tokens + [randn(len(lengths), WIDTH, dtype=dtype, grad=backward) for _ in range(num_rows)]
    cotangents = [randn(LAYOUT.num_tokens, WIDTH, dtype=dtype) for _ in range(num_outputs)]

    def by_index(*xs: Tensor) -> Any:
        return peer(*xs, lambda rows: rows[row_of_token])

    def by_expand(*xs: Tensor) -> Any:
        return peer(*xs, lambda rows: torch.cat([row.expand(n, -1) for row, n in zip(rows, lengths, strict=True)]))

    rows = {
        OURS: Implementation(lambda *xs: ours(*xs, boundaries)),
        "torch eager": Implementation(by_index),
        "torch.compile": Implementation(compiled(by_index)),
    }
    if backward and not per_frame:  # few rows: a sum over slices compiles to less work than the index's scatter
        rows["torch.compile"] = Implementation(compiled(by_expand))
    work = (num_inputs + num_outputs + (backward_tensors if backward else 0)) * gigabytes(tokens[0])
    if not backward:
        rows["copy"] = copied(work)
    name = f"{op}, rows per {'frame' if per_frame else 'sample'}"
    return Race(name, dtype, backward, work, "gbps", inputs, cotangents, by_expand, rows)


@pytest.mark.parametrize(("backward", "implementation"), passes(OURS, "torch eager", "torch.compile", forward_only=["copy"]))
@pytest.mark.parametrize("per_frame", [False, True], ids=["sample", "frame"])
@pytest.mark.parametrize("op", ADALN)
def test_adaln(measure, implementation, op, backward, per_frame):
    measure(implementation, adaln, op, MAIN, backward, per_frame=per_frame)
