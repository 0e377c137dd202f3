"""adaLN: gated residual, normalisation and modulation of packed tokens [N, D], rows of shift, scale and gate by cu_seqlens.

Forward: a program owns TOKENS whole rows of D elements, held in registers between mean, variance and result, so memory sees each
input once. The row r of a token is a binary search in cu_seqlens whose latency hides behind the loads of x. Bytes moved per token:
2 D elements (modulate), 3 D (gate), 4 D (both), and D or 2 D or 3 D that the caches serve when neighbours share a row.

Backward, without atomics: a program owns a chunk of up to K tokens of one row r, writes dx, and sums in float32

    A_r = sum dout * xhat        B_r = sum dout        G_r = sum d(residual) * x

A second kernel adds the chunks of each row in order: dscale = weight * A + bias * B, dshift = B, dgate = G. A third one adds rows
for the norm's own parameters: dweight = sum_r (1 + scale_r) * A_r, dbias = sum_r (1 + scale_r) * B_r.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import OPTIONS, find_row, find_slot, num_slots, power_of_2, row_range, stride, sum_chunks

K = 32  # tokens of a chunk: enough that writing its sums is a few percent of reading it, few enough to fill a GPU


@triton.jit
def _load_row(p, stride, row, cols, mask):
    return tl.load(p + row.to(tl.int64)[:, None] * stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_row(p, stride, row, cols, mask, value):
    tl.store(p + row.to(tl.int64)[:, None] * stride + cols[None, :], value.to(p.dtype.element_ty), mask=mask)


@triton.jit
def _load_affine(p, cols, D, default: tl.constexpr):
    """The norm's weight or bias [1, BLOCK_D]; `default` where it has none."""
    if p is None:
        return tl.full([1, 1], default, tl.float32)
    else:
        return tl.load(p + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "search_steps"])
def forward_kernel(
    p_residual, p_x, p_gate, p_shift, p_scale, p_cu, p_weight, p_bias, p_residual_out, p_out, p_mean, p_rstd,
    s_residual, s_x, s_gate, s_shift, s_scale, num_tokens, num_rows, search_steps, eps,
    D: tl.constexpr, RMS: tl.constexpr, GATE: tl.constexpr, NORM: tl.constexpr, TOKENS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    cols = tl.arange(0, BLOCK_D)
    in_row = (cols < D)[None, :]
    load = (token < num_tokens)[:, None] & in_row
    h = _load_row(p_x, s_x, token, cols, load)  # before the search, which it hides
    if GATE:
        residual = _load_row(p_residual, s_residual, token, cols, load)
    row = find_row(p_cu, num_rows, token, search_steps)
    used = row < num_rows
    inside = used[:, None] & load
    if GATE:
        h = residual + _load_row(p_gate, s_gate, row, cols, inside) * h
        h = tl.where(inside, h, 0.0).to(p_residual_out.dtype.element_ty)
        _store_row(p_residual_out, D, token, cols, load, h)
        h = h.to(tl.float32)  # the norm is of the residual as stored
    if NORM:
        if RMS:
            mean = tl.zeros([TOKENS], tl.float32)
            centred = h
        else:
            mean = tl.sum(h, axis=1) * (1 / D)
            # The mean of what is left corrects the rounding of the sum: a row of one large value has that very mean.
            mean += tl.sum(tl.where(in_row, h - mean[:, None], 0.0), axis=1) * (1 / D)
            centred = tl.where(in_row, h - mean[:, None], 0.0)
        rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(centred * centred, axis=1) * (1 / D) + eps))
        y = centred * rstd[:, None] * _load_affine(p_weight, cols, D, 1.0) + _load_affine(p_bias, cols, D, 0.0)
        y = y * (1 + _load_row(p_scale, s_scale, row, cols, inside)) + _load_row(p_shift, s_shift, row, cols, inside)
        _store_row(p_out, D, token, cols, load, tl.where(inside, y, 0.0))
        tl.store(p_mean + token, tl.where(used, mean, 0.0), mask=token < num_tokens)
        tl.store(p_rstd + token, tl.where(used, rstd, 0.0), mask=token < num_tokens)


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "search_steps"])
def backward_kernel(
    p_dresidual_out, p_dout, p_h, p_x, p_gate, p_scale, p_cu, p_weight, p_mean, p_rstd, p_dresidual, p_dx, p_sums,
    s_dresidual_out, s_dout, s_h, s_x, s_gate, s_scale, num_tokens, num_rows, search_steps,
    D: tl.constexpr, RMS: tl.constexpr, GATE: tl.constexpr, NORM: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    slots = tl.num_programs(0)
    slot = tl.program_id(0)
    cols = tl.arange(0, BLOCK_D)
    row, begin, end = find_slot(p_cu, num_rows, num_tokens, slot, search_steps, K)
    row_block = row + tl.zeros([1], tl.int32)
    load_row = (row_block < num_rows)[:, None] & (cols < D)[None, :]  # of the slack all counts as zero, and so do its gradients
    a_sum = tl.zeros([BLOCK_D], tl.float32)
    b_sum = tl.zeros([BLOCK_D], tl.float32)
    g_sum = tl.zeros([BLOCK_D], tl.float32)
    for first in range(begin, end, TOKENS):
        token = first + tl.arange(0, TOKENS)
        store = (token < end)[:, None] & (cols < D)[None, :]
        inside = store & load_row
        if GATE:
            dh = _load_row(p_dresidual_out, s_dresidual_out, token, cols, inside)
        if NORM:
            dout = _load_row(p_dout, s_dout, token, cols, inside)
            h = _load_row(p_h, s_h, token, cols, inside)
            mean = tl.load(p_mean + token, mask=token < end, other=0.0)[:, None]
            rstd = tl.load(p_rstd + token, mask=token < end, other=0.0)[:, None]
            xhat = tl.where(inside, (h - mean) * rstd, 0.0)
            # The row's factors are read anew for each token, from L1: kept, they would cost registers that hide latency.
            factor = (1 + _load_row(p_scale, s_scale, row_block, cols, load_row)) * _load_affine(p_weight, cols, D, 1.0)
            dy = dout * factor
            a_sum += tl.sum(dout * xhat, axis=0)
            b_sum += tl.sum(dout, axis=0)
            dnorm = dy - xhat * (tl.sum(dy * xhat, axis=1) * (1 / D))[:, None]
            if not RMS:
                dnorm -= (tl.sum(dy, axis=1) * (1 / D))[:, None]
            dnorm *= rstd
            if GATE:
                dh += dnorm
            else:
                dh = dnorm
        if GATE:
            x = _load_row(p_x, s_x, token, cols, inside)
            g_sum += tl.sum(dh * x, axis=0)
            _store_row(p_dresidual, D, token, cols, store, dh)
            dh *= _load_row(p_gate, s_gate, row_block, cols, load_row)
        _store_row(p_dx, D, token, cols, store, dh)
    # Sums [A, B, G][slots, D]; an empty slot's are never read.
    p_slot = p_sums + slot.to(tl.int64) * D + cols
    if begin < end and row < num_rows:
        if NORM:
            tl.store(p_slot, a_sum, mask=cols < D)
            tl.store(p_slot + slots.to(tl.int64) * D, b_sum, mask=cols < D)
        if GATE:
            tl.store(p_slot + 2 * slots.to(tl.int64) * D, g_sum, mask=cols < D)


@triton.jit(do_not_specialize=["slots", "num_tokens", "num_rows"])
def rows_kernel(
    p_sums, p_cu, p_weight, p_bias, p_dshift, p_dscale, p_dgate, p_rows, slots, num_tokens, num_rows,
    D: tl.constexpr, GATE: tl.constexpr, NORM: tl.constexpr, K: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (r, block of columns): the chunks of row r in order."""
    row = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin, end = row_range(p_cu, row, num_rows, num_tokens)
    num_chunks = tl.cdiv(end - begin, K)
    first_slot = begin // K + row
    o_row = row.to(tl.int64) * D + cols
    if NORM:
        a = sum_chunks(p_sums, first_slot, num_chunks, cols, D, CHUNKS)
        b = sum_chunks(p_sums + slots.to(tl.int64) * D, first_slot, num_chunks, cols, D, CHUNKS)
        dscale = a * tl.reshape(_load_affine(p_weight, cols, D, 1.0) + tl.zeros([1, BLOCK_D], tl.float32), [BLOCK_D])
        if p_bias is not None:
            dscale += b * tl.load(p_bias + cols, mask=cols < D, other=0.0).to(tl.float32)
        tl.store(p_dscale + o_row, dscale.to(p_dscale.dtype.element_ty), mask=cols < D)
        tl.store(p_dshift + o_row, b.to(p_dshift.dtype.element_ty), mask=cols < D)
        if p_rows is not None:
            tl.store(p_rows + o_row, a, mask=cols < D)
            tl.store(p_rows + num_rows.to(tl.int64) * D + o_row, b, mask=cols < D)
    if GATE:
        g = sum_chunks(p_sums + 2 * slots.to(tl.int64) * D, first_slot, num_chunks, cols, D, CHUNKS)
        tl.store(p_dgate + o_row, g.to(p_dgate.dtype.element_ty), mask=cols < D)


@triton.jit(do_not_specialize=["num_rows"])
def affine_kernel(
    p_rows, p_scale, p_dweight, p_dbias, s_scale, num_rows, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Program (block of columns): all rows in order."""
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    dweight = tl.zeros([BLOCK_D], tl.float32)
    dbias = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, num_rows, ROWS):
        row = first + tl.arange(0, ROWS)
        load = (row < num_rows)[:, None] & (cols < D)[None, :]
        factor = 1 + _load_row(p_scale, s_scale, row, cols, load)
        dweight += tl.sum(factor * _load_row(p_rows, D, row, cols, load), axis=0)
        dbias += tl.sum(factor * _load_row(p_rows, D, num_rows + row, cols, load), axis=0)
    if p_dweight is not None:
        tl.store(p_dweight + cols, dweight.to(p_dweight.dtype.element_ty), mask=cols < D)
    if p_dbias is not None:
        tl.store(p_dbias + cols, dbias.to(p_dbias.dtype.element_ty), mask=cols < D)


@functools.cache
def _tile(width: int) -> dict[str, int]:
    """TOKENS x BLOCK_D of about a thousand elements or more, 16 to a thread; 8 tokens at most, for short sums."""
    block = power_of_2(width)
    tokens = min(max(1024 // block, 1), 8)
    return {"TOKENS": tokens, "BLOCK_D": block, "num_warps": min(max(tokens * block // 512, 1), 32), **OPTIONS}


def _forward(residual, x, gate, shift, scale, cu_seqlens, rms, weight, bias, eps, residual_out, out, mean, rstd) -> None:
    (num_tokens, width), num_rows = x.shape, cu_seqlens.shape[0] - 1
    tile = _tile(width)
    if num_tokens and width:
        forward_kernel[(triton.cdiv(num_tokens, tile["TOKENS"]),)](
            residual, x, gate, shift, scale, cu_seqlens, weight, bias, residual_out, out, mean, rstd,
            *map(stride, (residual, x, gate, shift, scale)), num_tokens, num_rows, num_rows.bit_length(), eps,
            D=width, RMS=rms, GATE=gate is not None, NORM=scale is not None, **tile,
        )  # fmt: skip


def _backward(
    dresidual_out, dout, residual_out, x, gate, scale, cu_seqlens, rms, weight, bias, mean, rstd,
    dresidual, dx, dgate, dshift, dscale, dweight, dbias,
) -> None:  # fmt: skip
    (num_tokens, width), num_rows = dx.shape, cu_seqlens.shape[0] - 1
    constants = {"D": width, "GATE": gate is not None, "NORM": scale is not None, "K": K}
    slots = num_slots(num_tokens, num_rows, K)
    sums = dx.new_empty((3, slots, width), dtype=torch.float32)
    rows = dx.new_empty((2, num_rows, width), dtype=torch.float32) if dweight is not None or dbias is not None else None
    if not width:
        return
    backward_kernel[(slots,)](
        dresidual_out, dout, residual_out, x, gate, scale, cu_seqlens, weight, mean, rstd, dresidual, dx, sums,
        *map(stride, (dresidual_out, dout, residual_out, x, gate, scale)), num_tokens, num_rows, num_rows.bit_length(),
        RMS=rms, **constants, **_tile(width),
    )  # fmt: skip
    block = min(power_of_2(width), 128)
    blocks = triton.cdiv(width, block)
    if num_rows:
        rows_kernel[(num_rows, blocks)](
            sums, cu_seqlens, weight, bias, dshift, dscale, dgate, rows, slots, num_tokens, num_rows, **constants, CHUNKS=16,
            BLOCK_D=block, **OPTIONS,
        )  # fmt: skip
    if rows is not None:
        affine_kernel[(blocks,)](rows, scale, dweight, dbias, stride(scale), num_rows, D=width, ROWS=16, BLOCK_D=block, **OPTIONS)


def layer_norm_modulate_forward(
    x: Tensor, shift: Tensor, scale: Tensor, cu_seqlens: Tensor, rms: bool, weight: Tensor | None, bias: Tensor | None, eps: float,
    out: Tensor, mean: Tensor, rstd: Tensor,
) -> None:  # fmt: skip
    _forward(None, x, None, shift, scale, cu_seqlens, rms, weight, bias, eps, None, out, mean, rstd)


def layer_norm_modulate_backward(
    dout: Tensor, x: Tensor, scale: Tensor, cu_seqlens: Tensor, rms: bool, weight: Tensor | None, bias: Tensor | None, mean: Tensor,
    rstd: Tensor, dx: Tensor, dshift: Tensor, dscale: Tensor, dweight: Tensor | None, dbias: Tensor | None,
) -> None:  # fmt: skip
    norm = scale, cu_seqlens, rms, weight, bias, mean, rstd
    _backward(None, dout, x, None, None, *norm, None, dx, None, dshift, dscale, dweight, dbias)


def gate_residual_forward(residual: Tensor, x: Tensor, gate: Tensor, cu_seqlens: Tensor, out: Tensor) -> None:
    _forward(residual, x, gate, None, None, cu_seqlens, False, None, None, 0.0, out, None, None, None)


def gate_residual_backward(
    dout: Tensor, x: Tensor, gate: Tensor, cu_seqlens: Tensor, dresidual: Tensor, dx: Tensor, dgate: Tensor
) -> None:
    norm = None, cu_seqlens, False, None, None, None, None
    _backward(dout, None, None, x, gate, *norm, dresidual, dx, dgate, None, None, None, None)


def gate_residual_layer_norm_modulate_forward(
    residual: Tensor, x: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, cu_seqlens: Tensor, rms: bool, weight: Tensor | None,
    bias: Tensor | None, eps: float, residual_out: Tensor, out: Tensor, mean: Tensor, rstd: Tensor,
) -> None:  # fmt: skip
    _forward(residual, x, gate, shift, scale, cu_seqlens, rms, weight, bias, eps, residual_out, out, mean, rstd)


gate_residual_layer_norm_modulate_backward = _backward
