"""The bias and activation of an MLP, against eager and compiled torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.race import (
    FORWARD,
    IDS,
    LAYOUT,
    ON_GPU,
    OURS,
    WIDTH,
    Implementation,
    Race,
    compiled,
    copied,
    gigabytes,
    of_pass,
    passes,
    randn,
)
from sora_kernels.bias_gelu import bias_gelu
from sora_kernels.layout import PackedLayout

HIDDEN = 4 * WIDTH if ON_GPU else 1536  # on a CPU that of a DiT of S width


def plain(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias, approximate="tanh")


def activation(dtype: torch.dtype, which: str, *, layout: PackedLayout = LAYOUT) -> Race:
    torch.manual_seed(0)
    x, bias = (randn(*shape, HIDDEN, dtype=dtype, grad=which != FORWARD) for shape in ((layout.num_tokens,), ()))
    work = of_pass(which, 2, 3) * gigabytes(x)
    rows = {
        OURS: Implementation(bias_gelu),
        "torch eager": Implementation(plain),
        "torch.compile": Implementation(compiled(plain)),
        "copy": copied(work),
    }
    return Race("bias_gelu", dtype, which, {"gbps": work}, [x, bias], [randn(*x.shape, dtype=dtype)], plain, rows)


@pytest.mark.parametrize(("which", "implementation"), passes(OURS, "torch eager", "torch.compile"), ids=IDS.get)
@pytest.mark.parametrize("dtype", [torch.bfloat16] if ON_GPU else [torch.float32, torch.bfloat16], ids=str)
def test_bias_gelu(measure, implementation, dtype, which):
    measure(implementation, activation, dtype, which)
