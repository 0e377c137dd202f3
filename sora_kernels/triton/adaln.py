"""adaLN: gated residual, normalisation and modulation of packed tokens [N, D], rows of shift, scale and gate by cu_rows.

Forward: a program owns TOKENS whole rows of D elements, held in registers between mean, variance and result, so memory sees each
input once. The row r of a token is a binary search in cu_rows whose latency hides behind the loads of x. Bytes moved per token:
2 D elements (modulate), 3 D (gate), 4 D (both), and D or 2 D or 3 D that the caches serve when neighbours share a row.

Backward, without atomics: a program owns a chunk of up to K tokens of one row r, writes dx, and sums in float32

    A_r = sum dout * xhat        B_r = sum dout        G_r = sum d(residual) * x

A second kernel adds the chunks of each row in order: dscale = weight * A + bias * B, dshift = B, dgate = G. A third one adds rows
for the norm's own parameters: dweight = sum_r (1 + scale_r) * A_r, dbias = sum_r (1 + scale_r) * B_r.

What is absent is None, and so is a sum that nobody asked for: kernels are compiled without it. What travels together is a plain
tuple, because a launch takes longer over named ones; kernels name its members. Only members are asked whether they are None: on
Triton 3.6 `tuple is None` fails if one of them is. Counts stay outside: `do_not_specialize` knows nothing of integers in a tuple,
and every batch would compile anew.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import OPTIONS, find_row, find_slot, num_slots, power_of_2, row_range, sum_chunks

K = 32  # tokens of a chunk: enough that writing its sums is a few percent of reading it, few enough to fill a GPU


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


@triton.jit
def _load_rows(matrix, row, cols, mask):
    matrix = Matrix(*matrix)
    p_row = matrix.data + row.to(tl.int64)[:, None] * matrix.stride + cols[None, :]
    return tl.load(p_row, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_rows(p, row, cols, mask, value, D: tl.constexpr):
    tl.store(p + row.to(tl.int64)[:, None] * D + cols[None, :], value.to(p.dtype.element_ty), mask=mask)


@triton.jit
def _load_columns(p, cols, D: tl.constexpr):
    """The norm's weight or bias."""
    return tl.load(p + cols, mask=cols < D, other=0.0).to(tl.float32)


# Without boundaries one row serves all tokens.


@triton.jit
def _find_row(p_cu, num_rows, token, search_steps):
    if p_cu is None:
        return token * 0
    else:
        return find_row(p_cu, num_rows, token, search_steps)


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


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "search_steps"])
def forward_kernel(
    residual, x, gate, shift, scale, norm, p_cu, p_residual_out, p_out, num_tokens, num_rows, search_steps, eps,
    D: tl.constexpr, RMS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    norm = Norm(*norm)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    cols = tl.arange(0, BLOCK_D)
    in_row = (cols < D)[None, :]
    in_tokens = token < num_tokens
    load = in_tokens[:, None] & in_row
    h = _load_rows(x, token, cols, load)  # before the search, which it hides
    if residual is not None:
        before = _load_rows(residual, token, cols, load)
    row = _find_row(p_cu, num_rows, token, search_steps)
    used = row < num_rows
    inside = used[:, None] & load
    if residual is not None:
        if gate is not None:
            h = _load_rows(gate, row, cols, inside) * h
        h = tl.where(inside, before + h, 0.0).to(p_residual_out.dtype.element_ty)
        _store_rows(p_residual_out, token, cols, load, h, D)
        h = h.to(tl.float32)  # the norm is of the residual as stored
    if norm.mean is not None:
        if RMS:
            mean = tl.zeros([TOKENS], tl.float32)
            centred = h
        else:
            mean = tl.sum(h, axis=1) * (1 / D)
            # The mean of what is left corrects the rounding of the sum: a row of one large value has that very mean.
            mean += tl.sum(tl.where(in_row, h - mean[:, None], 0.0), axis=1) * (1 / D)
            centred = tl.where(in_row, h - mean[:, None], 0.0)
        rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(centred * centred, axis=1) * (1 / D) + eps))
        y = centred * rstd[:, None]
        if norm.weight is not None:
            y *= _load_columns(norm.weight, cols, D)[None, :]
        if norm.bias is not None:
            y += _load_columns(norm.bias, cols, D)[None, :]
        if scale is not None:
            y *= 1 + _load_rows(scale, row, cols, inside)
        if shift is not None:
            y += _load_rows(shift, row, cols, inside)
        _store_rows(p_out, token, cols, load, tl.where(inside, y, 0.0), D)
        tl.store(norm.mean + token, tl.where(used, mean, 0.0), mask=in_tokens)
        tl.store(norm.rstd + token, tl.where(used, rstd, 0.0), mask=in_tokens)


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "search_steps"])
def backward_kernel(
    dresidual_out, dout, normed, x, gate, scale, norm, p_cu, p_dresidual, p_dx, sums, num_tokens, num_rows, search_steps,
    D: tl.constexpr, RMS: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, BLOCK_D: tl.constexpr,
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
            dh = _load_rows(dresidual_out, token, cols, inside)
        if norm.mean is not None:
            dy = _load_rows(dout, token, cols, inside)
            h = _load_rows(normed, token, cols, inside)
            mean = tl.load(norm.mean + token, mask=token < end, other=0.0)[:, None]
            rstd = tl.load(norm.rstd + token, mask=token < end, other=0.0)[:, None]
            xhat = tl.where(inside, (h - mean) * rstd, 0.0)
            if sums.scale is not None:
                scale_sum += tl.sum(dy * xhat, axis=0)
            if sums.shift is not None:
                shift_sum += tl.sum(dy, axis=0)
            # The row's factors are read anew for each token, from L1: kept, they would cost registers that hide latency.
            factor = tl.full([1, 1], 1.0, tl.float32)
            if scale is not None:
                factor += _load_rows(scale, row_block, cols, load_row)
            if norm.weight is not None:
                factor *= _load_columns(norm.weight, cols, D)[None, :]
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
            gate_sum += tl.sum(dh * _load_rows(x, token, cols, inside), axis=0)
        if p_dresidual is not None:
            _store_rows(p_dresidual, token, cols, store, dh, D)
        if gate is not None:
            dh *= _load_rows(gate, row_block, cols, load_row)
        if p_dx is not None:
            _store_rows(p_dx, token, cols, store, dh, D)
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
            dscale *= _load_columns(norm.weight, cols, D)
        if norm.bias is not None:
            dscale += b * _load_columns(norm.bias, cols, D)
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
def affine_kernel(totals, scale, gradients, num_rows, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Program (block of columns): all rows in order."""
    totals, gradients = Sums(*totals), Gradients(*gradients)
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    dweight = tl.zeros([BLOCK_D], tl.float32)
    dbias = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, num_rows, ROWS):
        row = first + tl.arange(0, ROWS)
        load = (row < num_rows)[:, None] & (cols < D)[None, :]
        o_rows = row.to(tl.int64)[:, None] * D + cols[None, :]
        factor = tl.full([1, 1], 1.0, tl.float32)
        if scale is not None:
            factor += _load_rows(scale, row, cols, load)
        if totals.scale is not None:
            dweight += tl.sum(factor * tl.load(totals.scale + o_rows, mask=load, other=0.0), axis=0)
        if totals.shift is not None:
            dbias += tl.sum(factor * tl.load(totals.shift + o_rows, mask=load, other=0.0), axis=0)
    if totals.scale is not None:
        tl.store(gradients.weight + cols, dweight.to(gradients.weight.dtype.element_ty), mask=cols < D)
    if totals.shift is not None:
        tl.store(gradients.bias + cols, dbias.to(gradients.bias.dtype.element_ty), mask=cols < D)


@functools.cache
def _tile(width: int) -> dict[str, int]:
    """TOKENS x BLOCK_D of about a thousand elements or more, 16 to a thread; 8 tokens at most, for short sums."""
    block = power_of_2(width)
    tokens = min(max(1024 // block, 1), 8)
    return {"TOKENS": tokens, "BLOCK_D": block, "num_warps": min(max(tokens * block // 512, 1), 32), **OPTIONS}


def _num_rows(cu_rows: Tensor | None) -> int:
    return 1 if cu_rows is None else cu_rows.shape[0] - 1


def _forward(
    x: Tensor,
    modulation: Modulation,
    cu_rows: Tensor | None,
    *,
    residual: Tensor | None = None,
    residual_out: Tensor | None = None,
    norm: Norm = NO_NORM,
    rms: bool = False,
    eps: float = 0.0,
    out: Tensor | None = None,
) -> None:
    (num_tokens, width), num_rows, tile = x.shape, _num_rows(cu_rows), _tile(x.shape[1])
    if num_tokens and width:
        forward_kernel[(triton.cdiv(num_tokens, tile["TOKENS"]),)](
            matrix(residual), matrix(x), *map(matrix, modulation), tuple(norm), cu_rows, residual_out, out, num_tokens, num_rows,
            num_rows.bit_length(), eps, D=width, RMS=rms, **tile,
        )  # fmt: skip


def _backward(
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
) -> None:
    """x is what the gate multiplies. Without a norm, dout is the gradient of the residual."""
    if norm.mean is None:
        dresidual_out = dout
    (num_tokens, width), num_rows = dout.shape, _num_rows(cu_rows)
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
        dresidual, dx, tuple(sums), num_tokens, num_rows, num_rows.bit_length(), D=width, RMS=rms, K=K, **_tile(width),
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
        affine_kernel[(blocks,)](tuple(totals), scale, tuple(gradients), num_rows, D=width, ROWS=16, BLOCK_D=block, **OPTIONS)


def layer_norm_modulate_forward(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, cu_rows: Tensor | None, rms: bool, weight: Tensor | None,
    bias: Tensor | None, eps: float, out: Tensor, mean: Tensor, rstd: Tensor,
) -> None:  # fmt: skip
    modulation = Modulation(shift=shift, scale=scale)
    _forward(x, modulation, cu_rows, norm=Norm(weight, bias, mean, rstd), rms=rms, eps=eps, out=out)


def layer_norm_modulate_backward(
    dout: Tensor, x: Tensor, scale: Tensor | None, cu_rows: Tensor | None, rms: bool, weight: Tensor | None, bias: Tensor | None,
    mean: Tensor, rstd: Tensor, dx: Tensor, dshift: Tensor | None, dscale: Tensor | None, dweight: Tensor | None,
    dbias: Tensor | None,
) -> None:  # fmt: skip
    gradients = Gradients(shift=dshift, scale=dscale, weight=dweight, bias=dbias)
    norm = Norm(weight, bias, mean, rstd)
    _backward(dout, Modulation(scale=scale), cu_rows, gradients, normed=x, norm=norm, rms=rms, dx=dx)


def gate_residual_forward(residual: Tensor, x: Tensor, gate: Tensor | None, cu_rows: Tensor | None, out: Tensor) -> None:
    _forward(x, Modulation(gate=gate), cu_rows, residual=residual, residual_out=out)


def gate_residual_backward(
    dout: Tensor, x: Tensor | None, gate: Tensor | None, cu_rows: Tensor | None, dresidual: Tensor, dx: Tensor | None,
    dgate: Tensor | None,
) -> None:  # fmt: skip
    _backward(dout, Modulation(gate=gate), cu_rows, Gradients(gate=dgate), x=x, dresidual=dresidual, dx=dx)


def gate_residual_layer_norm_modulate_forward(
    residual: Tensor, x: Tensor, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None, cu_rows: Tensor | None,
    rms: bool, weight: Tensor | None, bias: Tensor | None, eps: float, residual_out: Tensor, out: Tensor, mean: Tensor,
    rstd: Tensor,
) -> None:  # fmt: skip
    modulation = Modulation(gate=gate, shift=shift, scale=scale)
    norm = Norm(weight, bias, mean, rstd)
    _forward(x, modulation, cu_rows, residual=residual, residual_out=residual_out, norm=norm, rms=rms, eps=eps, out=out)


def gate_residual_layer_norm_modulate_backward(
    dresidual_out: Tensor, dout: Tensor, residual_out: Tensor, x: Tensor | None, gate: Tensor | None, scale: Tensor | None,
    cu_rows: Tensor | None, rms: bool, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor,
    dresidual: Tensor, dx: Tensor | None, dgate: Tensor | None, dshift: Tensor | None, dscale: Tensor | None,
    dweight: Tensor | None, dbias: Tensor | None,
) -> None:  # fmt: skip
    modulation = Modulation(gate=gate, scale=scale)
    gradients = Gradients(dgate, dshift, dscale, dweight, dbias)
    _backward(
        dout, modulation, cu_rows, gradients, dresidual_out=dresidual_out, normed=residual_out, x=x,
        norm=Norm(weight, bias, mean, rstd), rms=rms, dresidual=dresidual, dx=dx,
    )  # fmt: skip
