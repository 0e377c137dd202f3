"""3D RoPE of packed heads [N, H, d], alone or after RMSNorm.

A program owns TOKENS tokens and HEADS heads (all heads, where the norm goes across them), in registers from load to store, so
that memory sees each element once: 2 H d elements per token, and 3 H d in the backward pass. Tiles are [heads, tokens, channels]:
Triton gives threads to the last axis first, then to tokens, so a thread holds the same channels of the same token in all heads,
and one cosine and sine serves them all.

Angles need no table: position and turns = position * theta**(-p/n) / 2 pi are computed in float64, where their whole part is
dropped and the nearest quarter turn split off, exactly; what remains is within pi/4, where float32 polynomials give sine and cosine
to about one unit in the last place. That is some forty instructions per token and pair.

Backward of the norm, with dn = R^T dout the gradient turned back, xhat = x * rstd and a mean over the normalised group:

    dx = rstd * (dn * weight - xhat * mean(dn * weight * xhat))        dweight = sum of dn * xhat over tokens (and heads)

A program owns a run of tokens and sums its part of dweight in float32; a second kernel adds the parts in order.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import OPTIONS, Axes, find_row, power_of_2, sum_parts

MAX_PARTS = 1024  # of dweight: enough programs to fill a GPU, few enough to add up in no time
MIN_TOKENS = 16  # to a part, which costs as much memory traffic as one token or two
# What must not compile a kernel anew; integers in tuples would.
SIZES = ["octaves_t", "octaves_h", "octaves_w", "num_tokens", "num_spans", "search_steps"]


class Tables(NamedTuple):
    """Of the spans: boundaries, grids, and the positions of their first tokens and the steps from there, [spans, 3] each."""

    cu: Any
    grid: Any
    origin: Any
    step: Any


class Rows(NamedTuple):
    """The rows of x [N, H, d]."""

    pointer: Any
    token_stride: Any
    head_stride: Any


@triton.jit
def _position(tables, span, axis: tl.constexpr, index, used):
    origin = tl.load(tables.origin + 3 * span + axis, mask=used, other=0.0).to(tl.float64)
    return origin + tl.load(tables.step + 3 * span + axis, mask=used, other=0.0).to(tl.float64) * index


@triton.jit
def _frequency(octaves, pair, PAIRS_T: tl.constexpr, PAIRS_H: tl.constexpr):
    """Turns per unit of position of each pair, theta**(-p/n) / 2 pi, float64, to 2e-15.

    A table of them would be a copy from the host, which a graph's capture forbids, in each call, or else be kept between calls; and
    what is allocated while a graph is captured, or while torch.compile warms one up, is memory of that graph.
    """
    first = tl.where(pair < PAIRS_T, 0, tl.where(pair < PAIRS_T + PAIRS_H, PAIRS_T, PAIRS_T + PAIRS_H))
    bits = tl.where(pair < PAIRS_T, octaves.t, tl.where(pair < PAIRS_T + PAIRS_H, octaves.h, octaves.w)).to(tl.int64)
    return tl.exp2((first - pair) * bits.to(tl.float64, bitcast=True)) * 0.15915494309189535


@triton.jit
def _rotation(
    tables, octaves, num_spans, search_steps, token, PAIRS_T: tl.constexpr, PAIRS_H: tl.constexpr, BLOCK_P: tl.constexpr
):  # fmt: skip
    """cos and sin [1, TOKENS, BLOCK_P] of the tokens' angles, and whether a span has them [1, TOKENS, 1]."""
    span = find_row(tables.cu, num_spans, token, search_steps)
    used = span < num_spans
    raster = token - tl.load(tables.cu + span)
    height = tl.load(tables.grid + 3 * span + 1, mask=used, other=1)
    width = tl.load(tables.grid + 3 * span + 2, mask=used, other=1)
    t = _position(tables, span, 0, raster // (height * width), used)
    h = _position(tables, span, 1, raster // width % height, used)
    w = _position(tables, span, 2, raster % width, used)
    pair = tl.arange(0, BLOCK_P)[None, :]
    position = tl.where(pair < PAIRS_T, t[:, None], tl.where(pair < PAIRS_T + PAIRS_H, h[:, None], w[:, None]))
    turns = position * _frequency(octaves, pair, PAIRS_T, PAIRS_H)
    turns = 4 * (turns - tl.floor(turns))  # quarter turns, so that these two steps are exact
    quarter = tl.floor(turns + 0.5)
    a = ((turns - quarter) * 1.5707963267948966).to(tl.float32)
    quarter = quarter.to(tl.int32)
    z = a * a
    sin_a = a + a * z * (-1.6666654611e-1 + z * (8.3321608736e-3 + z * -1.9515295891e-4))  # Cephes' sinf and cosf
    cos_a = 1 - 0.5 * z + z * z * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5))
    swap = quarter % 2 == 1
    cos = tl.where(swap, sin_a, cos_a)
    sin = tl.where(swap, cos_a, sin_a)
    cos = tl.where((quarter + 1) % 4 < 2, cos, -cos)
    sin = tl.where(quarter % 4 < 2, sin, -sin)
    return cos[None, :, :], sin[None, :, :], used[None, :, None]


@triton.jit
def head_rows(x, token, head, D: tl.constexpr, DENSE: tl.constexpr):
    """Pointers to the rows [HEADS, TOKENS, 1] of x; heads that lie end to end are known to be aligned."""
    s_head = x.head_stride
    if DENSE:
        s_head = D
    return x.pointer + token.to(tl.int64)[None, :, None] * x.token_stride + head.to(tl.int64)[:, None, None] * s_head


@triton.jit
def pair_columns(D: tl.constexpr, R: tl.constexpr, BLOCK_P: tl.constexpr):
    """Of the half layout: the columns [BLOCK_P] of both channels of each pair, and whether they are there.

    R of the D channels are rotated. The rest, which passes, is made into pairs behind them.
    """
    pair = tl.arange(0, BLOCK_P)
    if R < D:
        PAIRS: tl.constexpr = (D - R + 1) // 2  # that pass
        u = tl.where(pair < R // 2, pair, pair + R // 2)
        v = u + tl.where(pair < R // 2, R // 2, PAIRS)
        return u, v, pair < R // 2 + PAIRS, v < D
    else:
        return pair, D // 2 + pair, pair < D // 2, pair < D // 2


@triton.jit
def load_pairs(
    p_row, load_row, A: tl.constexpr, B: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BLOCK_P: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Both channels of each pair of the rows [A, B, 1]: float32 [A, B, BLOCK_P] each."""
    if INTERLEAVED:
        cols = tl.arange(0, 2 * BLOCK_P)[None, None, :]
        x = tl.load(p_row + cols, mask=load_row & (cols < D), other=0.0).to(tl.float32)
        return tl.split(tl.reshape(x, [A, B, BLOCK_P, 2]))
    else:
        c_u, c_v, has_u, has_v = pair_columns(D, R, BLOCK_P)
        u = tl.load(p_row + c_u[None, None, :], mask=load_row & has_u[None, None, :], other=0.0).to(tl.float32)
        v = tl.load(p_row + c_v[None, None, :], mask=load_row & has_v[None, None, :], other=0.0).to(tl.float32)
        return u, v


@triton.jit
def store_pairs(
    p_row, store_row, u, v, A: tl.constexpr, B: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BLOCK_P: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    u = u.to(p_row.dtype.element_ty)
    v = v.to(p_row.dtype.element_ty)
    if INTERLEAVED:
        cols = tl.arange(0, 2 * BLOCK_P)[None, None, :]
        tl.store(p_row + cols, tl.reshape(tl.join(u, v), [A, B, 2 * BLOCK_P]), mask=store_row & (cols < D))
    else:
        c_u, c_v, has_u, has_v = pair_columns(D, R, BLOCK_P)
        tl.store(p_row + c_u[None, None, :], u, mask=store_row & has_u[None, None, :])
        tl.store(p_row + c_v[None, None, :], v, mask=store_row & has_v[None, None, :])


@triton.jit
def load_weight(
    p, absent: tl.constexpr, token, head, H: tl.constexpr, D: tl.constexpr, R: tl.constexpr, ACROSS: tl.constexpr,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_P: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The norm's weight [HEADS, TOKENS, BLOCK_P], or [1, 1, BLOCK_P] where all heads have the same; `absent` without one."""
    if p is None:
        same = tl.full([1, 1, 1], absent, tl.float32)
        return same, same
    elif ACROSS:
        # For each token: a tile of one would give threads to heads, and x would go through shared memory to meet it.
        p_row = p + head[:, None, None] * D + token[None, :, None] * 0
        return load_pairs(p_row, head[:, None, None] < H, HEADS, TOKENS, D, R, BLOCK_P, INTERLEAVED)
    else:
        zero = tl.zeros([1, 1, 1], tl.int32)
        return load_pairs(p + zero, zero == 0, 1, 1, D, R, BLOCK_P, INTERLEAVED)


@triton.jit
def group_mean(x, H: tl.constexpr, D: tl.constexpr, ACROSS: tl.constexpr):
    """Mean of [HEADS, TOKENS, BLOCK_P] pairs' sums over the channels of a head, or of all heads of a token."""
    total = tl.sum(x, axis=2, keep_dims=True)
    if ACROSS:
        return tl.sum(total, axis=0, keep_dims=True) * (1 / (H * D))
    else:
        return total * (1 / D)


@triton.jit
def groups(token, head, H: tl.constexpr, ACROSS: tl.constexpr):
    """Where the rstd of each normalised group lies: [1, TOKENS, 1] across heads, else [HEADS, TOKENS, 1]."""
    if ACROSS:
        return token.to(tl.int64)[None, :, None]
    else:
        return token.to(tl.int64)[None, :, None] * H + head[:, None, None]


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    p_x, p_weight, tables, octaves_t, octaves_h, octaves_w, p_out, p_rstd, s_token, s_head, num_tokens, num_spans, search_steps,
    eps, H: tl.constexpr, D: tl.constexpr, PAIRS_T: tl.constexpr, PAIRS_H: tl.constexpr, INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr, NORM: tl.constexpr, ACROSS: tl.constexpr, DENSE: tl.constexpr, HEADS: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    tables, octaves = Tables(*tables), Axes(octaves_t, octaves_h, octaves_w)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    row = (token < num_tokens)[None, :, None] & (head < H)[:, None, None]
    p_row = head_rows(Rows(p_x, s_token, s_head), token, head, D, DENSE)
    u, v = load_pairs(p_row, row, HEADS, TOKENS, D, D, BLOCK_P, INTERLEAVED)  # before the angles, which hide it
    cos, sin, used = _rotation(tables, octaves, num_spans, search_steps, token, PAIRS_T, PAIRS_H, BLOCK_P)
    if INVERSE:
        sin = -sin
    if NORM:
        rstd = tl.div_rn(1.0, tl.sqrt_rn(group_mean(u * u + v * v, H, D, ACROSS) + eps))
        w_u, w_v = load_weight(p_weight, 1.0, token, head, H, D, D, ACROSS, HEADS, TOKENS, BLOCK_P, INTERLEAVED)
        u = u * rstd * w_u
        v = v * rstd * w_v
        group = groups(token, head, H, ACROSS)
        store_rstd = (token < num_tokens)[None, :, None] if ACROSS else row
        tl.store(p_rstd + group, tl.where(used, rstd, 0.0), mask=store_rstd)
    y_u = tl.where(used, u * cos - v * sin, 0.0)
    y_v = tl.where(used, u * sin + v * cos, 0.0)
    store_pairs(head_rows(Rows(p_out, H * D, D), token, head, D, True), row, y_u, y_v, HEADS, TOKENS, D, D, BLOCK_P, INTERLEAVED)


@triton.jit(do_not_specialize=[*SIZES, "part"])
def backward_kernel(
    p_dout, p_x, p_weight, p_rstd, tables, octaves_t, octaves_h, octaves_w, p_dx, p_parts, s_dout_token, s_dout_head, s_token,
    s_head, num_tokens, num_spans, search_steps, part, H: tl.constexpr, D: tl.constexpr, PAIRS_T: tl.constexpr,
    PAIRS_H: tl.constexpr, INTERLEAVED: tl.constexpr, ACROSS: tl.constexpr, DENSE_DOUT: tl.constexpr, DENSE: tl.constexpr,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Program (run of `part` tokens, block of heads)."""
    tables, octaves = Tables(*tables), Axes(octaves_t, octaves_h, octaves_w)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    ROWS: tl.constexpr = HEADS if ACROSS else 1  # of the weight
    dw_u = tl.zeros([ROWS, TOKENS, BLOCK_P], tl.float32)
    dw_v = tl.zeros([ROWS, TOKENS, BLOCK_P], tl.float32)
    begin = tl.program_id(0) * part
    for first in range(begin, tl.minimum(begin + part, num_tokens), TOKENS):
        token = first + tl.arange(0, TOKENS)
        row = (token < num_tokens)[None, :, None] & (head < H)[:, None, None]
        p_row = head_rows(Rows(p_dout, s_dout_token, s_dout_head), token, head, D, DENSE_DOUT)
        g_u, g_v = load_pairs(p_row, row, HEADS, TOKENS, D, D, BLOCK_P, INTERLEAVED)  # before the angles, which hide them
        p_row = head_rows(Rows(p_x, s_token, s_head), token, head, D, DENSE)
        u, v = load_pairs(p_row, row, HEADS, TOKENS, D, D, BLOCK_P, INTERLEAVED)
        group = groups(token, head, H, ACROSS)
        rstd = tl.load(p_rstd + group, mask=(token < num_tokens)[None, :, None] if ACROSS else row, other=0.0)
        cos, sin, used = _rotation(tables, octaves, num_spans, search_steps, token, PAIRS_T, PAIRS_H, BLOCK_P)
        g_u = tl.where(used, g_u, 0.0)  # of the slack all counts as zero
        g_v = tl.where(used, g_v, 0.0)
        u = tl.where(used, u, 0.0)
        v = tl.where(used, v, 0.0)
        u *= rstd
        v *= rstd
        dn_u = g_u * cos + g_v * sin
        dn_v = g_v * cos - g_u * sin
        if ACROSS:
            dw_u += dn_u * u
            dw_v += dn_v * v
        else:
            dw_u += tl.sum(dn_u * u, axis=0, keep_dims=True)
            dw_v += tl.sum(dn_v * v, axis=0, keep_dims=True)
        w_u, w_v = load_weight(p_weight, 1.0, token, head, H, D, D, ACROSS, HEADS, TOKENS, BLOCK_P, INTERLEAVED)
        dn_u *= w_u
        dn_v *= w_v
        mean = group_mean(dn_u * u + dn_v * v, H, D, ACROSS)
        dx_u = rstd * (dn_u - u * mean)
        dx_v = rstd * (dn_v - v * mean)
        store_pairs(
            head_rows(Rows(p_dx, H * D, D), token, head, D, True), row, dx_u, dx_v, HEADS, TOKENS, D, D, BLOCK_P, INTERLEAVED
        )
    if p_parts is not None:
        slot = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        weight_row = tl.arange(0, ROWS)[:, None, None]
        p_slot = p_parts + (slot.to(tl.int64) * (H if ACROSS else 1) + weight_row) * D
        dw_u = tl.sum(dw_u, axis=1, keep_dims=True)
        dw_v = tl.sum(dw_v, axis=1, keep_dims=True)
        store_pairs(p_slot, weight_row < H, dw_u, dw_v, ROWS, 1, D, D, BLOCK_P, INTERLEAVED)


def tile_of(x: Tensor, interleaved: bool, across: bool, per_thread: int) -> dict[str, int]:
    """`per_thread` elements to a thread: vectors of 16 bytes of as many heads of one token, so that heads share its angles."""
    _, heads, d = x.shape
    block, threads, vector = power_of_2((d + 1) // 2), 128, 16 // x.element_size()
    if across:
        heads = power_of_2(heads)
        tokens = max(threads * per_thread // (heads * 2 * block), 1)
        threads = min(max(heads * tokens * 2 * block // per_thread, threads), 1024)
    else:
        vectors = 1 if interleaved else 2  # a thread has the first channels of its pairs and, in the half layout, the second ones
        heads = min(power_of_2(heads), per_thread // (vectors * vector))
        tokens = max(threads * vectors * vector // (2 * block), 1)
    return {"HEADS": heads, "TOKENS": tokens, "BLOCK_P": block, "num_warps": threads // 32, **OPTIONS}


def _octaves(theta: Sequence[float], axes_dim: Sequence[int]) -> dict[str, int]:
    """By how many octaves an axis' frequency falls from pair to pair, log2(theta) / n: float64 numbers, as the integers of their
    bits, because Triton takes floats as float32.
    """
    # -0.0 for a theta of 1, whose bits, unlike those of 0.0, Triton takes for 64 of them: no other type, no other kernel.
    falls = [math.log2(base) / max(channels // 2, 1) or -0.0 for base, channels in zip(theta, axes_dim, strict=True)]
    bits = struct.unpack("<3q", struct.pack("<3d", *falls))
    return dict(zip(("octaves_t", "octaves_h", "octaves_w"), bits, strict=True))


class Rope(NamedTuple):
    """What a call's launches share."""

    tables: Tables
    theta: Sequence[float]
    axes_dim: Sequence[int]
    interleaved: bool
    across_heads: bool = False

    def arguments(self, x: Tensor) -> dict[str, Any]:
        """Of every kernel, for x [N, H, d]."""
        num_spans = self.tables.cu.shape[0] - 1
        return {
            "tables": tuple(self.tables), **_octaves(self.theta, self.axes_dim), "num_tokens": x.shape[0], "num_spans": num_spans,
            "search_steps": num_spans.bit_length(), "s_token": x.stride(0), "s_head": x.stride(1),
            "H": x.shape[1], "D": x.shape[2], "PAIRS_T": self.axes_dim[0] // 2, "PAIRS_H": self.axes_dim[1] // 2,
            "INTERLEAVED": self.interleaved, "ACROSS": self.across_heads, "DENSE": x.stride(1) == x.shape[2],
        }  # fmt: skip


def _forward(
    rope: Rope, x: Tensor, weight: Tensor | None, out: Tensor, rstd: Tensor | None, *, inverse: bool = False, eps: float = 0.0
) -> None:
    num_tokens, heads, _ = x.shape
    tile = tile_of(x, rope.interleaved, rope.across_heads, 64)
    if num_tokens and heads:
        forward_kernel[triton.cdiv(num_tokens, tile["TOKENS"]), triton.cdiv(heads, tile["HEADS"])](
            p_x=x, p_weight=weight, p_out=out, p_rstd=rstd, eps=eps, INVERSE=inverse, NORM=rstd is not None, **rope.arguments(x),
            **tile,
        )  # fmt: skip


def _backward(
    rope: Rope, dout: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, dx: Tensor, dweight: Tensor | None
) -> None:  # fmt: skip
    num_tokens, heads, d = x.shape
    tile = tile_of(x, rope.interleaved, rope.across_heads, 32)
    blocks = triton.cdiv(heads, tile["HEADS"])
    part = max(triton.cdiv(num_tokens * blocks, MAX_PARTS), MIN_TOKENS)
    part = triton.cdiv(part, tile["TOKENS"]) * tile["TOKENS"]
    runs = triton.cdiv(num_tokens, part) if heads else 0
    parts = None if dweight is None else dweight.new_empty((runs * blocks, dweight.shape[0]), dtype=torch.float32)
    if runs:
        backward_kernel[runs, blocks](
            p_dout=dout, p_x=x, p_weight=weight, p_rstd=rstd, p_dx=dx, p_parts=parts, part=part, s_dout_token=dout.stride(0),
            s_dout_head=dout.stride(1), DENSE_DOUT=dout.stride(1) == d, **rope.arguments(x), **tile,
        )  # fmt: skip
    if parts is not None and dweight is not None:
        sum_parts(parts, dweight)


def rope_3d(
    x: Tensor, cu_spans: Tensor, grid: Tensor, origin: Tensor, step: Tensor, theta: list[float], axes_dim: list[int],
    interleaved: bool, inverse: bool, out: Tensor,
) -> None:  # fmt: skip
    _forward(Rope(Tables(cu_spans, grid, origin, step), theta, axes_dim, interleaved), x, None, out, None, inverse=inverse)


def qk_norm_rope_3d_forward(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cu_spans: Tensor, grid: Tensor, origin: Tensor,
    step: Tensor, theta: list[float], axes_dim: list[int], interleaved: bool, across_heads: bool, eps: float,
    q_out: Tensor, k_out: Tensor, q_rstd: Tensor, k_rstd: Tensor,
) -> None:  # fmt: skip
    rope = Rope(Tables(cu_spans, grid, origin, step), theta, axes_dim, interleaved, across_heads)
    for x, weight, out, rstd in ((q, q_weight, q_out, q_rstd), (k, k_weight, k_out, k_rstd)):
        _forward(rope, x, weight, out, rstd, eps=eps)


def qk_norm_rope_3d_backward(
    dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, q_rstd: Tensor,
    k_rstd: Tensor, cu_spans: Tensor, grid: Tensor, origin: Tensor, step: Tensor, theta: list[float], axes_dim: list[int],
    interleaved: bool, across_heads: bool, dq: Tensor, dk: Tensor, dq_weight: Tensor | None, dk_weight: Tensor | None,
) -> None:  # fmt: skip
    rope = Rope(Tables(cu_spans, grid, origin, step), theta, axes_dim, interleaved, across_heads)
    sides = ((dq_out, q, q_weight, q_rstd, dq, dq_weight), (dk_out, k, k_weight, k_rstd, dk, dk_weight))
    for dout, x, weight, rstd, dx, dweight in sides:
        _backward(rope, dout, x, weight, rstd, dx, dweight)
