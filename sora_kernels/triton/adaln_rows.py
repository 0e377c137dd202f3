"""What the forward and backward kernels of adaLN share: rows of tokens, of modulations and of the norm, and the size of a block.

What is absent is None, and so is a sum that nobody asked for: kernels are compiled without it. What travels together is a plain
tuple, because a launch takes longer over named ones; kernels name its members. Only members are asked whether they are None: on
Triton 3.6 `tuple is None` fails if one of them is. Counts stay outside: `do_not_specialize` knows nothing of integers in a tuple,
and every batch would compile anew.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .common import OPTIONS, power_of_2


class Matrix(NamedTuple):
    """Rows of D elements, `stride` elements apart."""

    data: Any
    stride: Any


def matrix(x: Tensor | None) -> tuple[Tensor, int] | None:
    """The fields of a Matrix."""
    return None if x is None else (x, x.stride(0))


class Modulation(NamedTuple):
    """Rows [R, D]."""

    gate: Tensor | None = None
    shift: Tensor | None = None
    scale: Tensor | None = None


class Norm(NamedTuple):
    """The norm's own parameters [D], and the statistics [N] that it leaves to the backward."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    mean: Tensor | None = None
    rstd: Tensor | None = None


NO_NORM = Norm()


@triton.jit
def load_rows(matrix, row, cols, mask):
    matrix = Matrix(*matrix)
    p_row = matrix.data + row.to(tl.int64)[:, None] * matrix.stride + cols[None, :]
    return tl.load(p_row, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_rows(p, row, cols, mask, value, D: tl.constexpr):
    tl.store(p + row.to(tl.int64)[:, None] * D + cols[None, :], value.to(p.dtype.element_ty), mask=mask)


@triton.jit
def load_columns(p, cols, D: tl.constexpr):
    """The norm's weight or bias."""
    return tl.load(p + cols, mask=cols < D, other=0.0).to(tl.float32)


@functools.cache
def tile(width: int) -> dict[str, int]:
    """TOKENS x BLOCK_D of about a thousand elements or more, 16 to a thread; 8 tokens at most, for short sums."""
    block = power_of_2(width)
    tokens = min(max(1024 // block, 1), 8)
    return {"TOKENS": tokens, "BLOCK_D": block, "num_warps": min(max(tokens * block // 512, 1), 32), **OPTIONS}


def count_rows(cu_rows: Tensor | None) -> int:
    return 1 if cu_rows is None else cu_rows.shape[0] - 1
