"""gelu(x + bias) of packed tokens [N, D], in the tanh approximation, from s = (1 + tanh z) / 2 = 1 / (1 + exp(-2 z)):

    gelu(u) = u s,   gelu'(u) = s + u s (1 - s) 2 dz/du,   z = sqrt(2 / pi) (u + 0.044715 u**3)

A program owns up to K tokens of BLOCK_D columns; each element is read and written once. The backward sums its tokens' gradients
of the bias in float32, and a second kernel adds the programs in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import LOG2E, OPTIONS, power_of_2, reciprocal, stride, sum_parts

K = 32  # tokens of a program: writing and reading its sums is 1/24 of what it moves in bfloat16
SLOPE: tl.constexpr = tl.constexpr(1.5957691216057308)  # 2 z = SLOPE (u + CUBIC u**3)
CUBIC: tl.constexpr = tl.constexpr(0.044715)


@triton.jit
def _gelu(u):
    """(gelu(u), gelu'(u)), from e = exp(-2 |z|), which cannot overflow."""
    square = u * u
    inner = tl.abs(u) * (SLOPE * LOG2E + SLOPE * LOG2E * CUBIC * square)
    e = tl.exp2(-inner)
    r = reciprocal(1 + e)  # a plain division alone would double the error
    s = tl.where(u < 0, e * r, r)
    bounded = tl.where(square < 1e4, square, 1e4)  # beyond, e is 0
    return u * s, s + u * (e * r * r) * (SLOPE + 3 * SLOPE * CUBIC * bounded)


@triton.jit(do_not_specialize=["num_tokens"])
def gelu_kernel(
    p_x, p_bias, p_dout, p_out, p_sums, s_x, s_dout, num_tokens,
    D: tl.constexpr, BACKWARD: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    bias = tl.zeros([BLOCK_D], tl.float32)
    if p_bias is not None:
        bias = tl.load(p_bias + cols, mask=cols < D, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, K, TOKENS):
        token = chunk * K + first + tl.arange(0, TOKENS)
        row = token.to(tl.int64)[:, None]
        inside = (token < num_tokens)[:, None] & (cols < D)[None, :]
        u = tl.load(p_x + row * s_x + cols[None, :], mask=inside, other=0.0).to(tl.float32) + bias[None, :]
        value, slope = _gelu(u)
        if BACKWARD:
            value = tl.load(p_dout + row * s_dout + cols[None, :], mask=inside, other=0.0).to(tl.float32) * slope
            total += tl.sum(value, axis=0)
        tl.store(p_out + row * D + cols[None, :], value.to(p_out.dtype.element_ty), mask=inside)
    if p_sums is not None:
        tl.store(p_sums + chunk.to(tl.int64) * D + cols, total, mask=cols < D)


def _run(*, x: Tensor, bias: Tensor | None, dout: Tensor | None, out: Tensor, sums: Tensor | None) -> None:
    """out is the result, or with dout the gradient of x."""
    num_tokens, width = x.shape
    block = min(power_of_2(width), 512)
    if num_tokens and width:
        gelu_kernel[(triton.cdiv(num_tokens, K), triton.cdiv(width, block))](
            p_x=x, p_bias=bias, p_dout=dout, p_out=out, p_sums=sums, s_x=stride(x), s_dout=stride(dout), num_tokens=num_tokens,
            D=width, BACKWARD=dout is not None, K=K, TOKENS=4, BLOCK_D=block, num_warps=4, **OPTIONS,
        )  # fmt: skip


def bias_gelu_forward(x: Tensor, bias: Tensor | None, out: Tensor) -> None:
    _run(x=x, bias=bias, dout=None, out=out, sums=None)


def bias_gelu_backward(dout: Tensor, x: Tensor, bias: Tensor | None, dx: Tensor, dbias: Tensor | None) -> None:
    sums = None if dbias is None else x.new_empty((triton.cdiv(x.shape[0], K), x.shape[1]), dtype=torch.float32)
    _run(x=x, bias=bias, dout=dout, out=dx, sums=sums)
    if sums is not None and dbias is not None:
        sum_parts(sums, dbias)
