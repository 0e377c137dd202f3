"""What the Triton kernels share: finding a token's row, sums over pieces of rows, and how kernels are shaped."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Of every launch. Triton 3.10 no longer contracts a * b + c by default.
OPTIONS = {"enable_fp_fusion": True}
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


def power_of_2(n: int) -> int:
    """The least power of two that is at least n, and at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def input_precision(dtype: torch.dtype) -> str:
    """How a product of float32 is computed: as torch would, by `torch.set_float32_matmul_precision`."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


def stride(x: Tensor | None, dim: int = 0) -> int:
    return 0 if x is None else x.stride(dim)


@triton.jit
def find_row(p_cu, num_rows, token, search_steps):
    """The row r with cu[r] <= token < cu[r+1], num_rows for a token past the end; `token` is a block of any shape.

    A binary search of search_steps = num_rows.bit_length() loads, which all hit the cache.
    """
    low = token * 0
    high = low + num_rows
    for _ in range(search_steps):
        middle = (low + high) // 2
        searching = low < high
        after = tl.load(p_cu + middle + 1, mask=searching, other=0) <= token
        low = tl.where(searching & after, middle + 1, low)
        high = tl.where(searching & after, high, middle)
    return low


# The tokens of each row of cu are cut into chunks of K, counted from the row's first token, so that no sum depends on what else is
# packed; the slack past cu[R] counts as row R. Chunk c of row r has the slot cu[r] // K + r + c: slots of different rows never
# meet, and there are N // K + R + 1 at most, so neither the host nor another kernel has to count chunks. Some slots stay empty.


def num_slots(num_tokens: int, num_rows: int, chunk: int) -> int:
    return num_tokens // chunk + num_rows + 1


@triton.jit
def find_slot(p_cu, num_rows, num_tokens, slot, search_steps, K: tl.constexpr):
    """(row, first token, one past the last token) of a slot; an empty range for an empty slot."""
    low = slot * 0
    high = low + num_rows
    for _ in range(search_steps):  # the last row whose first slot is not past this one
        middle = (low + high + 1) // 2
        before = tl.load(p_cu + middle) // K + middle <= slot
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle - 1)
    first = tl.load(p_cu + low)
    begin = first + (slot - first // K - low) * K
    end = tl.load(p_cu + low + 1, mask=low < num_rows, other=num_tokens)
    return low, begin, tl.minimum(tl.minimum(begin + K, end), num_tokens)


@triton.jit
def sum_chunks(p_partial, first_slot, num_chunks, cols, num_cols, CHUNKS: tl.constexpr):
    """Sum over a row's chunks of partial [slots, num_cols] -> a block of `cols`, in a fixed order."""
    total = tl.zeros(cols.shape, tl.float32)
    for start in range(0, num_chunks, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        p_chunk = p_partial + (first_slot + chunk).to(tl.int64)[:, None] * num_cols + cols[None, :]
        part = tl.load(p_chunk, mask=(chunk < num_chunks)[:, None] & (cols < num_cols)[None, :], other=0.0)
        total += tl.sum(part, axis=0)
    return total


@triton.jit
def tanh(x):
    """To a few ulp: from exp2, but below 0.6, where 1 - exp(-2|x|) would cancel, by a minimax fit of relative error 3e-9."""
    magnitude = tl.abs(x)
    e = tl.exp2(magnitude * -2.8853900817779268)
    square = x * x
    p = -0.005895156413316727 * square + 0.020795971155166626
    p = p * square - 0.053783830255270004
    p = p * square + 0.13331924378871918
    p = p * square - 0.33333298563957214
    t = tl.where(magnitude < 0.6, magnitude + magnitude * (square * p), (1 - e) / (1 + e))
    return tl.where(x < 0, -t, t)


# ---- the softmax of attention, with scores in units of log2(e)


@triton.jit
def softmax_step(acc, m, total, s, v, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """One block of keys into the running softmax: output, maximum and sum of each row."""
    m_new = tl.maximum(m, tl.max(s, axis=1))
    reference = tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new  # a row may have seen no key yet
    p = tl.exp2(s - reference[:, None])
    correction = tl.exp2(m - reference)
    total = total * correction + tl.sum(p, axis=1)
    acc = tl.dot(p.to(v.dtype), v, acc * correction[:, None], input_precision=PRECISION)
    return acc, m_new, total


@triton.jit
def load_lse(p_lse, row, num_q):
    """lse in units of log2(e), as a float32 and its rounding error; +inf for a query without keys, so its probabilities are 0."""
    lse = tl.load(p_lse + row, mask=row < num_q, other=float("-inf"))
    empty = lse == float("-inf")
    scaled = tl.where(empty, 0.0, lse) * LOG2E
    high = scaled.to(tl.float32)
    return tl.where(empty, float("inf"), high), (scaled - high.to(tl.float64)).to(tl.float32)


@triton.jit
def probabilities(s, high, low, EXACT: tl.constexpr):
    """exp of score - lse; `low` matters where scores are float32, as it scales whole rows."""
    if EXACT:
        return tl.exp2((s - high) - low)
    else:
        return tl.exp2(s - high)


@triton.jit
def dscores(p, dp, delta, t, CAPPED: tl.constexpr):
    if CAPPED:
        return p * (dp - delta) * (1 - t * t)
    else:
        return p * (dp - delta)
