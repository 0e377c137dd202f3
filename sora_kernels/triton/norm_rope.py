"""RoPE of heads [N, H, d] from tables of cosines and sines, alone or after a norm; or the norm alone.

Programs, tiles and sums are rope.py's: TOKENS tokens and HEADS heads in registers from load to store, 2 H d elements per token and
3 H d in the backward pass. To these come r numbers of the tables for each token, or r for each of its heads; the heads of a program
share the former. Pairs that pass have a cosine of 1 and a sine of 0.

Backward of the norm, with dn = R^T dout the gradient turned back, xhat = (x - mean) * rstd and means over the normalised group, of
which only a LayerNorm has those of x and of dn * weight:

    dx = rstd * (dn * weight - mean(dn * weight) - xhat * mean(dn * weight * xhat))
    dweight = sum of dn * xhat and dbias = sum of dn, over tokens (and heads)
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import stride, sum_parts
from .rope import (
    MAX_PARTS,
    MIN_TOKENS,
    Rows,
    group_mean,
    groups,
    head_rows,
    load_pairs,
    load_weight,
    pair_columns,
    store_pairs,
    tile_of,
)

# What must not compile a kernel anew.
SIZES = ["num_tokens", "table_rows"]


@triton.jit
def _load_table(
    p_table, s_token, s_head, row, head, H: tl.constexpr, R: tl.constexpr, PER_HEAD: tl.constexpr, BLOCK_P: tl.constexpr,
    OTHER: tl.constexpr,
):  # fmt: skip
    """Rows of cos or sin: [1, TOKENS, BLOCK_P], or [HEADS, TOKENS, BLOCK_P] where each head has its own."""
    pair = tl.arange(0, BLOCK_P)[None, None, :]
    p_row = p_table + row.to(tl.int64)[None, :, None] * s_token
    if PER_HEAD:
        p_row += head.to(tl.int64)[:, None, None] * s_head
        return tl.load(p_row + pair, mask=(pair < R // 2) & (head < H)[:, None, None], other=OTHER)
    else:
        return tl.load(p_row + pair, mask=pair < R // 2, other=OTHER)


@triton.jit
def _inside(D: tl.constexpr, R: tl.constexpr, BLOCK_P: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Which channels [1, 1, BLOCK_P] of pairs there are."""
    if INTERLEAVED:
        pair = tl.arange(0, BLOCK_P)
        return (2 * pair < D)[None, None, :], (2 * pair + 1 < D)[None, None, :]
    else:
        _, _, has_u, has_v = pair_columns(D, R, BLOCK_P)
        return has_u[None, None, :], has_v[None, None, :]


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    p_x, p_weight, p_bias, p_cos, p_sin, p_out, p_mean, p_rstd, s_token, s_head, s_cos_token, s_cos_head, s_sin_token, s_sin_head,
    num_tokens, table_rows, eps, H: tl.constexpr, D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr, ACROSS: tl.constexpr, PER_HEAD: tl.constexpr, DENSE: tl.constexpr, HEADS: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A norm has an rstd, a LayerNorm also a mean."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    row = (token < num_tokens)[None, :, None] & (head < H)[:, None, None]
    p_row = head_rows(Rows(p_x, s_token, s_head), token, head, D, DENSE)
    u, v = load_pairs(p_row, row, HEADS, TOKENS, D, R, BLOCK_P, INTERLEAVED)
    if p_rstd is not None:
        group = groups(token, head, H, ACROSS)
        store_group = (token < num_tokens)[None, :, None] if ACROSS else row
        if p_mean is not None:
            has_u, has_v = _inside(D, R, BLOCK_P, INTERLEAVED)
            mean = group_mean(u + v, H, D, ACROSS)
            # What rounding left of the mean corrects it: equal channels have that very mean, and no variance.
            left = group_mean(tl.where(has_u, u - mean, 0.0) + tl.where(has_v, v - mean, 0.0), H, D, ACROSS)
            mean += left
            u = tl.where(has_u, u - mean, 0.0)
            v = tl.where(has_v, v - mean, 0.0)
            tl.store(p_mean + group, mean, mask=store_group)
        rstd = tl.div_rn(1.0, tl.sqrt_rn(group_mean(u * u + v * v, H, D, ACROSS) + eps))
        tl.store(p_rstd + group, rstd, mask=store_group)
        w_u, w_v = load_weight(p_weight, 1.0, token, head, H, D, R, ACROSS, HEADS, TOKENS, BLOCK_P, INTERLEAVED)
        u = u * rstd * w_u
        v = v * rstd * w_v
        if p_bias is not None:
            b_u, b_v = load_weight(p_bias, 0.0, token, head, H, D, R, ACROSS, HEADS, TOKENS, BLOCK_P, INTERLEAVED)
            u += b_u
            v += b_v
    p_row = head_rows(Rows(p_out, H * D, D), token, head, D, True)
    if R > 0:
        table_row = token % table_rows
        cos = _load_table(p_cos, s_cos_token, s_cos_head, table_row, head, H, R, PER_HEAD, BLOCK_P, 1.0)
        sin = _load_table(p_sin, s_sin_token, s_sin_head, table_row, head, H, R, PER_HEAD, BLOCK_P, 0.0)
        if INVERSE:
            sin = -sin
        store_pairs(p_row, row, u * cos - v * sin, u * sin + v * cos, HEADS, TOKENS, D, R, BLOCK_P, INTERLEAVED)
    else:
        store_pairs(p_row, row, u, v, HEADS, TOKENS, D, R, BLOCK_P, INTERLEAVED)


@triton.jit(do_not_specialize=[*SIZES, "part"])
def backward_kernel(
    p_dout, p_x, p_weight, p_cos, p_sin, p_mean, p_rstd, p_dx, p_weight_parts, p_bias_parts, s_dout_token, s_dout_head, s_token,
    s_head, s_cos_token, s_cos_head, s_sin_token, s_sin_head, num_tokens, table_rows, part, H: tl.constexpr, D: tl.constexpr,
    R: tl.constexpr, INTERLEAVED: tl.constexpr, ACROSS: tl.constexpr, PER_HEAD: tl.constexpr, DENSE_DOUT: tl.constexpr,
    DENSE: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Program (run of `part` tokens, block of heads)."""
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    ROWS: tl.constexpr = HEADS if ACROSS else 1  # of the weight
    dw_u = tl.zeros([ROWS, TOKENS, BLOCK_P], tl.float32)
    dw_v = tl.zeros([ROWS, TOKENS, BLOCK_P], tl.float32)
    db_u = tl.zeros([1, TOKENS, BLOCK_P], tl.float32)
    db_v = tl.zeros([1, TOKENS, BLOCK_P], tl.float32)
    begin = tl.program_id(0) * part
    for first in range(begin, tl.minimum(begin + part, num_tokens), TOKENS):
        token = first + tl.arange(0, TOKENS)
        row = (token < num_tokens)[None, :, None] & (head < H)[:, None, None]
        p_row = head_rows(Rows(p_dout, s_dout_token, s_dout_head), token, head, D, DENSE_DOUT)
        dn_u, dn_v = load_pairs(p_row, row, HEADS, TOKENS, D, R, BLOCK_P, INTERLEAVED)
        p_row = head_rows(Rows(p_x, s_token, s_head), token, head, D, DENSE)
        u, v = load_pairs(p_row, row, HEADS, TOKENS, D, R, BLOCK_P, INTERLEAVED)
        group = groups(token, head, H, ACROSS)
        load_group = (token < num_tokens)[None, :, None] if ACROSS else row
        rstd = tl.load(p_rstd + group, mask=load_group, other=0.0)
        if p_mean is not None:
            mean = tl.load(p_mean + group, mask=load_group, other=0.0)
            u -= mean
            v -= mean
        u *= rstd
        v *= rstd
        if R > 0:
            table_row = token % table_rows
            cos = _load_table(p_cos, s_cos_token, s_cos_head, table_row, head, H, R, PER_HEAD, BLOCK_P, 1.0)
            sin = _load_table(p_sin, s_sin_token, s_sin_head, table_row, head, H, R, PER_HEAD, BLOCK_P, 0.0)
            g_u = dn_u
            g_v = dn_v
            dn_u = g_u * cos + g_v * sin
            dn_v = g_v * cos - g_u * sin
        if ACROSS:
            dw_u += dn_u * u
            dw_v += dn_v * v
        else:
            dw_u += tl.sum(dn_u * u, axis=0, keep_dims=True)
            dw_v += tl.sum(dn_v * v, axis=0, keep_dims=True)
        if p_bias_parts is not None:
            db_u += tl.sum(dn_u, axis=0, keep_dims=True)
            db_v += tl.sum(dn_v, axis=0, keep_dims=True)
        w_u, w_v = load_weight(p_weight, 1.0, token, head, H, D, R, ACROSS, HEADS, TOKENS, BLOCK_P, INTERLEAVED)
        dn_u *= w_u
        dn_v *= w_v
        along = group_mean(dn_u * u + dn_v * v, H, D, ACROSS)
        dx_u = dn_u - u * along
        dx_v = dn_v - v * along
        if p_mean is not None:
            level = group_mean(dn_u + dn_v, H, D, ACROSS)
            dx_u -= level
            dx_v -= level
        p_row = head_rows(Rows(p_dx, H * D, D), token, head, D, True)
        store_pairs(p_row, row, rstd * dx_u, rstd * dx_v, HEADS, TOKENS, D, R, BLOCK_P, INTERLEAVED)
    slot = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    if p_weight_parts is not None:
        weight_row = tl.arange(0, ROWS)[:, None, None]
        p_slot = p_weight_parts + (slot * (H if ACROSS else 1) + weight_row) * D
        dw_u = tl.sum(dw_u, axis=1, keep_dims=True)
        dw_v = tl.sum(dw_v, axis=1, keep_dims=True)
        store_pairs(p_slot, weight_row < H, dw_u, dw_v, ROWS, 1, D, R, BLOCK_P, INTERLEAVED)
    if p_bias_parts is not None:
        zero = tl.zeros([1, 1, 1], tl.int32)
        db_u = tl.sum(db_u, axis=1, keep_dims=True)
        db_v = tl.sum(db_v, axis=1, keep_dims=True)
        store_pairs(p_bias_parts + slot * D + zero, zero == 0, db_u, db_v, 1, 1, D, R, BLOCK_P, INTERLEAVED)


def _arguments(x: Tensor, cos: Tensor | None, sin: Tensor | None, interleaved: bool, across_heads: bool) -> dict[str, Any]:
    """Of every kernel, for x [N, H, d]. Without a rotation, channels are read as interleaved pairs are, in long vectors."""
    per_head = cos is not None and cos.ndim == 3
    s_cos_head, s_sin_head = (stride(table, 1) if per_head else 0 for table in (cos, sin))
    return {
        "p_cos": cos, "p_sin": sin, "s_token": x.stride(0), "s_head": x.stride(1), "s_cos_token": stride(cos),
        "s_cos_head": s_cos_head, "s_sin_token": stride(sin), "s_sin_head": s_sin_head, "num_tokens": x.shape[0],
        "table_rows": 1 if cos is None else cos.shape[0], "H": x.shape[1], "D": x.shape[2],
        "R": 0 if cos is None else 2 * cos.shape[-1], "INTERLEAVED": interleaved or cos is None, "ACROSS": across_heads,
        "PER_HEAD": per_head, "DENSE": x.stride(1) == x.shape[2],
    }  # fmt: skip


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, out: Tensor, mean: Tensor | None, rstd: Tensor | None,
    arguments: dict[str, Any], *, inverse: bool = False, eps: float = 0.0,
) -> None:  # fmt: skip
    num_tokens, heads, _ = x.shape
    tile = tile_of(x, arguments["INTERLEAVED"], arguments["ACROSS"], 64)
    if num_tokens and heads:
        forward_kernel[triton.cdiv(num_tokens, tile["TOKENS"]), triton.cdiv(heads, tile["HEADS"])](
            p_x=x, p_weight=weight, p_bias=bias, p_out=out, p_mean=mean, p_rstd=rstd, eps=eps, INVERSE=inverse, **arguments, **tile
        )  # fmt: skip


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool, out: Tensor) -> None:
    _forward(x, None, None, out, None, None, _arguments(x, cos, sin, interleaved, False), inverse=inverse)


def norm_rope_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, cos: Tensor | None, sin: Tensor | None, layer: bool, across_heads: bool,
    interleaved: bool, eps: float, out: Tensor, mean: Tensor | None, rstd: Tensor,
) -> None:  # fmt: skip
    _forward(x, weight, bias, out, mean, rstd, _arguments(x, cos, sin, interleaved, across_heads), eps=eps)


def norm_rope_backward(
    dout: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    mean: Tensor | None, rstd: Tensor, layer: bool, across_heads: bool, interleaved: bool,
    dx: Tensor, dweight: Tensor | None, dbias: Tensor | None,
) -> None:  # fmt: skip
    num_tokens, heads, d = x.shape
    arguments = _arguments(x, cos, sin, interleaved, across_heads)
    tile = tile_of(x, arguments["INTERLEAVED"], across_heads, 32)
    blocks = triton.cdiv(heads, tile["HEADS"])
    part = max(triton.cdiv(num_tokens * blocks, MAX_PARTS), MIN_TOKENS)
    part = triton.cdiv(part, tile["TOKENS"]) * tile["TOKENS"]
    runs = triton.cdiv(num_tokens, part) if heads else 0
    weight_parts, bias_parts = (
        None if sums is None else sums.new_empty((runs * blocks, sums.shape[0]), dtype=torch.float32) for sums in (dweight, dbias)
    )
    if runs:
        backward_kernel[runs, blocks](
            p_dout=dout, p_x=x, p_weight=weight, p_mean=mean, p_rstd=rstd, p_dx=dx, p_weight_parts=weight_parts,
            p_bias_parts=bias_parts, part=part, s_dout_token=dout.stride(0), s_dout_head=dout.stride(1),
            DENSE_DOUT=dout.stride(1) == d, **arguments, **tile,
        )  # fmt: skip
    for parts, sums in ((weight_parts, dweight), (bias_parts, dbias)):
        if parts is not None and sums is not None:
            sum_parts(parts, sums)
