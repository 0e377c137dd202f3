"""What the Triton kernels share: finding a token's row, sums over pieces of rows, and how kernels are shaped."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Of every launch. Triton 3.10 no longer contracts a * b + c by default.
OPTIONS = {"enable_fp_fusion": True}
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)

# In kernels, what belongs together is a NamedTuple. Launches pass its fields as a plain tuple, which takes the host less time, and
# kernels name them: `Tables(*tables)`.


class Axes(NamedTuple):
    """One of something along each axis of a span's grid."""

    t: Any
    h: Any
    w: Any


def power_of_2(n: int) -> int:
    """The least power of two that is at least n, and at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def input_precision(dtype: torch.dtype) -> str:
    """How a product of float32 is computed: as torch would. `torch.set_float32_matmul_precision` sets this attribute too.

    On AMD's GPUs in float32 whatever it says: all but gfx942 have no TF32, and Triton raises.
    """
    allowed = dtype == torch.float32 and not torch.version.hip and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def stride(x: Tensor | None, dim: int = 0) -> int:
    return 0 if x is None else x.stride(dim)


# Of an integer argument Triton knows whether 16 divides it and nothing else. For heads of 72 channels, say, whose rows begin at
# multiples of 16 bytes all the same, strides are passed divided by this unit, and `strided` multiplies them by it again.


def stride_unit(*tensors: Tensor) -> int:
    """Elements of 16 bytes if all strides are multiples of them and the head dim is not one of 16; otherwise 1."""
    vector = 16 // tensors[0].element_size()
    if tensors[0].shape[-1] % 16 == 0 or any(n % vector for x in tensors for n in x.stride()[:-1]):
        return 1
    return vector


def head_constants(q: Tensor, k: Tensor, *others: Tensor) -> dict[str, Any]:
    """What the kernels of attention are compiled for, of heads; `others` are tensors whose strides they multiply, too."""
    d = q.shape[-1]
    return {
        "GROUP": q.shape[-2] // max(k.shape[-2], 1),
        "UNIT": stride_unit(q, k, *others),
        "D": d,
        "BLOCK_D": max(power_of_2(d), 16),
        "PRECISION": input_precision(q.dtype),
    }


class HeadTensor(NamedTuple):
    """A tensor of heads, [B, S, H, d] or [N, H, d], in a kernel: its first element and its strides in elements."""

    pointer: Any
    batch_stride: Any
    token_stride: Any
    head_stride: Any


def head_tensors(unit: int, **tensors: Tensor) -> dict[str, tuple]:
    """By name the fields of HeadTensors, strides divided by `unit`. Plain tuples: Triton takes twice as long over named ones."""
    fields = {}
    for name, x in tensors.items():
        batch, token, head = x.stride()[:-1] if x.ndim == 4 else (0, *x.stride()[:-1])
        fields[name] = (x, batch, token, head) if unit == 1 else (x, batch // unit, token // unit, head // unit)
    return fields


@triton.jit
def strided(x, UNIT: tl.constexpr):
    """The HeadTensor of such fields."""
    pointer, batch, token, head = x
    return HeadTensor(pointer, batch * UNIT, token * UNIT, head * UNIT)


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


@triton.jit
def row_range(p_cu, row, num_rows, num_tokens):
    """(first token, one past the last) of a row or a block of rows of cu; row num_rows is the slack.

    Boundaries that are wrong are clamped: the host cannot read them, and so they give wrong numbers but touch nothing outside.
    """
    begin = tl.load(p_cu + tl.minimum(row, num_rows))
    end = tl.load(p_cu + row + 1, mask=row < num_rows, other=num_tokens)
    begin = tl.minimum(tl.maximum(begin, 0), num_tokens)
    return begin, tl.maximum(tl.minimum(end, num_tokens), begin)


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
    first, end = row_range(p_cu, low, num_rows, num_tokens)
    begin = tl.maximum(first + (slot - first // K - low) * K, first)
    return low, begin, tl.minimum(begin + K, end)


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


@triton.jit(do_not_specialize=["num_parts"])
def sum_kernel(p_parts, p_out, num_parts, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """Program (block of columns): all parts in order."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = sum_chunks(p_parts, 0, num_parts, cols, WIDTH, CHUNKS)
    tl.store(p_out + cols, total.to(p_out.dtype.element_ty), mask=cols < WIDTH)


def sum_parts(parts: Tensor, out: Tensor) -> None:
    """out [D] <- the sum of parts float32 [n, D], in a fixed order."""
    num_parts, width = parts.shape
    if width:
        sum_kernel[(triton.cdiv(width, 16),)](parts, out, num_parts, WIDTH=width, CHUNKS=256, BLOCK=16, **OPTIONS)


@triton.jit
def reciprocal(x):
    """1 / x of a normal, finite x, to half a unit in the last place or little more: a plain division, which may be off by two, and
    a step of Newton's. Of a whole tile, tl.div_rn would take three times the registers, as it branches.
    """
    r = 1 / x
    return tl.fma(tl.fma(-x, r, 1.0), r, r)


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
    t = tl.where(magnitude < 0.6, magnitude + magnitude * (square * p), (1 - e) * reciprocal(1 + e))
    return tl.where(x < 0, -t, t)


# The softmax of attention, of scores s: exp2(s * factor). Their maximum is subtracted before they are multiplied, so that of
# scores of any size the largest gives exactly 1; of scores of 1e10 the rounded product alone would be off by more than 2**7.


class Softmax(NamedTuple):
    """The running softmax of a block of queries: maximum of the scores and sum of p [rows], sum of p * v [rows, d]."""

    maximum: Any
    total: Any
    acc: Any


class Statistics(NamedTuple):
    """Maximum and sum of the softmax of each row of a head: the first maximum, and the stride from a row's maximum to its sum."""

    pointer: Any
    stride: Any


@triton.jit
def start_softmax(ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    return Softmax(maximum, total, tl.zeros([ROWS, BLOCK_D], tl.float32))


@triton.jit
def softmax_step(state, s, factor, v, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """One block of keys into the running softmax."""
    maximum = tl.maximum(state.maximum, tl.max(s, axis=1))
    reference = tl.where(maximum == float("-inf"), 0.0, maximum) if MASKED else maximum  # all keys so far may be masked
    p = tl.exp2((s - reference[:, None]) * factor)
    correction = tl.exp2((state.maximum - reference) * factor)
    total = state.total * correction + tl.sum(p, axis=1)
    acc = tl.dot(p.to(v.dtype), v, state.acc * correction[:, None], input_precision=PRECISION)
    return Softmax(maximum, total, acc)


@triton.jit
def divisors(state):
    """What the output of each row is divided by; 1 for a row without keys."""
    return tl.where(state.total == 0, 1.0, state.total)


@triton.jit
def lse_of(state, unit, shift):
    """Of each row; -inf without keys. Scores are unit times what the maximum is of, plus shift."""
    lse = state.maximum.to(tl.float64) * unit + shift + tl.log(divisors(state).to(tl.float64))
    return tl.where(state.total == 0, float("-inf"), lse).to(tl.float32)


@triton.jit
def load_softmax(statistics, row, inside):
    """(maximum, 1 / sum) of the softmax of rows; (+inf, 0), which makes its probabilities 0, of one without keys."""
    total = tl.load(statistics.pointer + statistics.stride + row, mask=inside, other=0.0)
    maximum = tl.load(statistics.pointer + row, mask=inside, other=0.0)
    empty = total == 0
    return tl.where(empty, float("inf"), maximum), tl.where(empty, 0.0, reciprocal(tl.where(empty, 1.0, total)))


@triton.jit
def store_softmax(statistics, row, inside, state):
    tl.store(statistics.pointer + row, state.maximum, mask=inside)
    tl.store(statistics.pointer + statistics.stride + row, state.total, mask=inside)


@triton.jit
def scores_of(products, seen, scale, PLAIN: tl.constexpr):
    """Scores, -inf where a query does not see a key; a positive scale alone (PLAIN) is left to `exponent_factor`."""
    return tl.where(seen, products if PLAIN else products * scale, float("-inf"))


@triton.jit
def exponent_factor(scale, PLAIN: tl.constexpr):
    return scale * LOG2E if PLAIN else LOG2E


@triton.jit
def probabilities(s, factor, maximum, inverse):
    return tl.exp2((s - maximum) * factor) * inverse


@triton.jit
def dscores(p, dp, delta, t, CAPPED: tl.constexpr):
    if CAPPED:
        return p * (dp - delta) * (1 - t * t)
    else:
        return p * (dp - delta)
