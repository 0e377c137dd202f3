"""The backward of adaLN, without atomics: a program owns a chunk of up to K tokens of one row r, writes dx, and sums in float32

    A_r = sum dout * xhat        B_r = sum dout        G_r = sum d(residual) * x

A second kernel adds the chunks of each row in order: dscale = weight * A + bias * B, dshift = B, dgate = G. A third one adds rows
for the norm's own parameters: dweight = sum_r (1 + scale_r) * A_r, dbias = sum_r (1 + scale_r) * B_r.

A gate of the norm itself (GATES_NORM) takes the place of 1 + scale, and its gradient that of dscale.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adaln_rows import NO_NORM, Modulation, Norm, count_rows, load_columns, load_rows, matrix, store_rows, tile
from .common import OPTIONS, find_slot, num_slots, power_of_2, row_range, sum_chunks

K = 32  # tokens of a chunk: enough that writing its sums is a few percent of reading it, few enough to fill a GPU


class Sums(NamedTuple):
    """G, B and A above, named by whose gradients they are: float32 [slots, D] of chunks, or [R, D] of rows."""

    gate: Tensor | None
    shift: Tensor | None
    scale: Tensor | None


class Gradients(NamedTuple):
    """Of the rows [R, D] and of the norm's parameters [D], contiguous."""

    gate: Tensor | None = None
    shift: Tensor | None = None
    scale: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None


# Without boundaries one row serves all tokens.


@triton.jit
def _row_range(p_cu, row, num_rows, num_tokens):
    if p_cu is None:
        return row * 0, num_tokens
    else:
        return row_range(p_cu, row, num_rows, num_tokens)


@triton.jit
def _find_slot(p_cu, num_rows, num_tokens, slot, search_steps, K: tl.constexpr):
    if p_cu is None:
        return slot * 0, slot * K, tl.minimum(slot * K + K, num_tokens)
    else:
        return find_slot(p_cu, num_rows, num_tokens, slot, search_steps, K)


@triton.jit
def _factor(scale, row, cols, mask, GATES_NORM: tl.constexpr):
    """What multiplies the norm in rows of tokens."""
    one = tl.full([1, 1], 1.0, tl.float32)
    if scale is None:
        return one
    elif GATES_NORM:
        return load_rows(scale, row, cols, mask)
    else:
        return one + load_rows(scale, row, cols, mask)


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "search_steps"])
def backward_kernel(
    dresidual_out, dout, normed, x, gate, scale, norm, p_cu, p_dresidual, p_dx, sums, num_tokens, num_rows, search_steps,
    D: tl.constexpr, RMS: tl.constexpr, GATES_NORM: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    norm, sums = Norm(*norm), Sums(*sums)
    slot = tl.program_id(0)
    cols = tl.arange(0, BLOCK_D)
    in_row = (cols < D)[None, :]
    row, begin, end = _find_slot(p_cu, num_rows, num_tokens, slot, search_steps, K)
    row_block = row + tl.zeros([1], tl.int32)
    load_row = (row_block < num_rows)[:, None] & in_row  # of the slack all counts as zero, and so do its gradients
    scale_sum = tl.zeros([BLOCK_D], tl.float32)
    shift_sum = tl.zeros([BLOCK_D], tl.float32)
    gate_sum = tl.zeros([BLOCK_D], tl.float32)
    for first in range(begin, end, TOKENS):
        token = first + tl.arange(0, TOKENS)
        store = (token < end)[:, None] & in_row
        inside = store & load_row
        if dresidual_out is not None:
            dh = load_rows(dresidual_out, token, cols, inside)
        if norm.mean is not None:
            dy = load_rows(dout, token, cols, inside)
            if GATES_NORM and p_dresidual is not None:
                store_rows(p_dresidual, token, cols, store, dy, D)
            h = load_rows(normed, token, cols, inside)
            mean = tl.load(norm.mean + token, mask=token < end, other=0.0)[:, None]
            rstd = tl.load(norm.rstd + token, mask=token < end, other=0.0)[:, None]
            xhat = tl.where(inside, (h - mean) * rstd, 0.0)
            if sums.scale is not None:
                scale_sum += tl.sum(dy * xhat, axis=0)
            if sums.shift is not None:
                shift_sum += tl.sum(dy, axis=0)
            # The row's factors are read anew for each token, from L1: kept, they would cost registers that hide latency.
            factor = _factor(scale, row_block, cols, load_row, GATES_NORM)
            if norm.weight is not None:
                factor *= load_columns(norm.weight, cols, D)[None, :]
            dy *= factor
            dnorm = dy - xhat * (tl.sum(dy * xhat, axis=1) * (1 / D))[:, None]
            if not RMS:
                dnorm -= (tl.sum(dy, axis=1) * (1 / D))[:, None]
            dnorm *= rstd
            if dresidual_out is not None:
                dh += dnorm
            else:
                dh = dnorm
        if sums.gate is not None:
            gate_sum += tl.sum(dh * load_rows(x, token, cols, inside), axis=0)
        if p_dresidual is not None and not GATES_NORM:
            store_rows(p_dresidual, token, cols, store, dh, D)
        if gate is not None:
            dh *= load_rows(gate, row_block, cols, load_row)
        if p_dx is not None:
            store_rows(p_dx, token, cols, store, dh, D)
    if begin < end and row < num_rows:  # the sums of an empty slot are never read
        o_slot = slot.to(tl.int64) * D + cols
        if sums.scale is not None:
            tl.store(sums.scale + o_slot, scale_sum, mask=cols < D)
        if sums.shift is not None:
            tl.store(sums.shift + o_slot, shift_sum, mask=cols < D)
        if sums.gate is not None:
            tl.store(sums.gate + o_slot, gate_sum, mask=cols < D)


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def rows_kernel(
    sums, norm, p_cu, gradients, totals, num_tokens, num_rows,
    D: tl.constexpr, K: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (r, block of columns): the chunks of row r in order."""
    sums, norm, gradients, totals = Sums(*sums), Norm(*norm), Gradients(*gradients), Sums(*totals)
    row = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin, end = _row_range(p_cu, row, num_rows, num_tokens)
    num_chunks = tl.cdiv(end - begin, K)
    first_slot = begin // K + row
    o_row = row.to(tl.int64) * D + cols
    if sums.scale is not None:
        a = sum_chunks(sums.scale, first_slot, num_chunks, cols, D, CHUNKS)
    if sums.shift is not None:
        b = sum_chunks(sums.shift, first_slot, num_chunks, cols, D, CHUNKS)
    if gradients.scale is not None:
        dscale = a
        if norm.weight is not None:
            dscale *= load_columns(norm.weight, cols, D)
        if norm.bias is not None:
            dscale += b * load_columns(norm.bias, cols, D)
        tl.store(gradients.scale + o_row, dscale.to(gradients.scale.dtype.element_ty), mask=cols < D)
    if gradients.shift is not None:
        tl.store(gradients.shift + o_row, b.to(gradients.shift.dtype.element_ty), mask=cols < D)
    if totals.scale is not None:
        tl.store(totals.scale + o_row, a, mask=cols < D)
    if totals.shift is not None:
        tl.store(totals.shift + o_row, b, mask=cols < D)
    if sums.gate is not None:
        g = sum_chunks(sums.gate, first_slot, num_chunks, cols, D, CHUNKS)
        tl.store(gradients.gate + o_row, g.to(gradients.gate.dtype.element_ty), mask=cols < D)


@triton.jit(do_not_specialize=["num_rows"])
def affine_kernel(
    totals, scale, gradients, num_rows, GATES_NORM: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (block of columns): all rows in order."""
    totals, gradients = Sums(*totals), Gradients(*gradients)
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    dweight = tl.zeros([BLOCK_D], tl.float32)
    dbias = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, num_rows, ROWS):
        row = first + tl.arange(0, ROWS)
        load = (row < num_rows)[:, None] & (cols < D)[None, :]
        o_rows = row.to(tl.int64)[:, None] * D + cols[None, :]
        factor = _factor(scale, row, cols, load, GATES_NORM)
        if totals.scale is not None:
            dweight += tl.sum(factor * tl.load(totals.scale + o_rows, mask=load, other=0.0), axis=0)
        if totals.shift is not None:
            dbias += tl.sum(factor * tl.load(totals.shift + o_rows, mask=load, other=0.0), axis=0)
    if totals.scale is not None:
        tl.store(gradients.weight + cols, dweight.to(gradients.weight.dtype.element_ty), mask=cols < D)
    if totals.shift is not None:
        tl.store(gradients.bias + cols, dbias.to(gradients.bias.dtype.element_ty), mask=cols < D)


def backward(
    dout: Tensor,
    modulation: Modulation,
    cu_rows: Tensor | None,
    gradients: Gradients,
    *,
    dresidual_out: Tensor | None = None,
    normed: Tensor | None = None,
    x: Tensor | None = None,
    norm: Norm = NO_NORM,
    rms: bool = False,
    dresidual: Tensor | None = None,
    dx: Tensor | None = None,
    gates_norm: bool = False,
) -> None:
    """x is what the gate multiplies. Without a norm, dout is the gradient of the residual."""
    if norm.mean is None:
        dresidual_out = dout
    (num_tokens, width), num_rows = dout.shape, count_rows(cu_rows)
    if not width:
        return
    slots = num_slots(num_tokens, num_rows, K)

    def floats(count: int, *wanted: object) -> Tensor | None:
        return dout.new_empty((count, width), dtype=torch.float32) if any(x is not None for x in wanted) else None

    dgate, dshift, dscale, dweight, dbias = gradients
    sums = Sums(
        gate=floats(slots, dgate),
        shift=floats(slots, dshift, dbias, None if dscale is None else norm.bias),
        scale=floats(slots, dscale, dweight),
    )
    scale = matrix(modulation.scale)
    backward_kernel[(slots,)](
        matrix(dresidual_out), matrix(dout), matrix(normed), matrix(x), matrix(modulation.gate), scale, tuple(norm), cu_rows,
        dresidual, dx, tuple(sums), num_tokens, num_rows, num_rows.bit_length(), D=width, RMS=rms, GATES_NORM=gates_norm, K=K,
        **tile(width),
    )  # fmt: skip
    totals = Sums(gate=None, shift=floats(num_rows, dbias), scale=floats(num_rows, dweight))
    block = min(power_of_2(width), 128)
    blocks = triton.cdiv(width, block)
    if num_rows and any(x is not None for x in sums):
        rows_kernel[(num_rows, blocks)](
            tuple(sums), tuple(norm), cu_rows, tuple(gradients), tuple(totals), num_tokens, num_rows, D=width, K=K, CHUNKS=16,
            BLOCK_D=block, **OPTIONS,
        )  # fmt: skip
    if any(x is not None for x in totals):
        affine_kernel[(blocks,)](
            tuple(totals), scale, tuple(gradients), num_rows, GATES_NORM=gates_norm, D=width, ROWS=16, BLOCK_D=block, **OPTIONS
        )
