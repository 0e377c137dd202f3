"""Attention within space-time windows of packed spans, forward and backward; the steps of the softmax are attention.py's.

A program owns a tile of BLOCK_M queries of one head: a box of a span's grid, 2 x 8 x 8 where the span is large enough, as a
compact tile has a small union of windows. It loops over the keys of that union, a box as well, and over those of the sample's other
spans, BLOCK_N at a time, reading rows of d elements wherever they lie. So the cost follows the window, not the span. For dk and dv
a program owns a tile of keys and loops over the queries that attend to them. Along an axis those are an interval too, so that the
same code serves both ways.

Tiles come from schedule.py's list. How many there are the host does not know, so programs take one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    Axes,
    Statistics,
    dscores,
    exponent_factor,
    head_constants,
    head_tensors,
    load_softmax,
    probabilities,
    scores_of,
    softmax_step,
    start_softmax,
    store_softmax,
    strided,
)
from .configs import attention_config, num_multiprocessors
from .schedule import Layout, entries_of, load_span, load_span_tiles, num_entries, tile_list

SIZES = ["num_spans", "num_tokens", "num_heads"]  # a batch of another size must not compile anew


class Interval(NamedTuple):
    """begin .. end, or blocks of both."""

    begin: Any
    end: Any


class Divisor(NamedTuple):
    """A number n >= 1, and what `divide` needs of it."""

    n: Any
    reciprocal: Any


class Box(NamedTuple):
    """A box of a span's grid: its first position along each axis, and how many tokens a frame and a row of it have."""

    t: Any
    h: Any
    w: Any
    frame: Divisor
    row: Divisor


class Range(NamedTuple):
    """The tokens on the other side of a tile's scores: first those of the sample's other spans, then a box of the tile's own span.

    `before` of the others come before the span, which has span_size tokens in frames of h x w.
    """

    num_tokens: Any
    num_others: Any
    before: Any
    span_size: Any
    span_begin: Any
    sample_begin: Any
    h: Any
    w: Any
    box: Box


class Tile(NamedTuple):
    """What a program owns, one tile of a head: its tokens [BLOCK], num_tokens past the tile's end; their windows, Axes of
    Intervals; and all tokens that at least one of them attends to, or that attend to it.
    """

    head: Any
    token: Any
    windows: Axes
    others: Range


@triton.jit
def axis_window(i, length, size, causal, OF_KEYS: tl.constexpr):
    """The keys of an axis that query i attends to; with OF_KEYS, the queries that attend to key i. Size 0 is the whole axis."""
    size = tl.where(size == 0, length, tl.minimum(size, length))
    if OF_KEYS:
        begin = tl.where(i < size, 0, i - size + 1 + size // 2)
        end = tl.where(i >= length - size, length, i + size // 2 + 1)
        return Interval(tl.where(causal, i, begin), tl.where(causal, tl.minimum(i + size, length), end))
    else:
        begin = tl.maximum(tl.minimum(i - size // 2, length - size), 0)
        return Interval(tl.where(causal, tl.maximum(i - size + 1, 0), begin), tl.where(causal, i + 1, begin + size))


@triton.jit
def tile_window(first, end, length, size, causal, OF_KEYS: tl.constexpr):
    """The union of the windows of first .. end along an axis: (begin, how many)."""
    begin = axis_window(first, length, size, causal, OF_KEYS).begin
    return begin, axis_window(tl.minimum(end, length) - 1, length, size, causal, OF_KEYS).end - begin


@triton.jit
def divisor(n):
    return Divisor(n, tl.full([], 0xFFFFFFFF, tl.uint32) // n.to(tl.uint32))


@triton.jit
def divide(x, by):
    """(x // n, x % n) for 0 <= x < 2**31: the product with the reciprocal is at most one too small."""
    quotient = tl.umulhi(x.to(tl.uint32), by.reciprocal).to(tl.int32)
    rest = x - quotient * by.n
    more = rest >= by.n
    return tl.where(more, quotient + 1, quotient), tl.where(more, rest - by.n, rest)


@triton.jit
def locate_tile(
    layout, p_list, program, window, causal, num_spans, num_tokens, num_heads, BLOCK: tl.constexpr, OF_KEYS: tl.constexpr
):
    """The tile of program number `program`, of all tiles and heads: of queries, or OF_KEYS."""
    s = tl.load(entries_of(p_list, num_spans) + program // num_heads)
    span = load_span(layout, s, num_spans, num_tokens)
    tiles = load_span_tiles(p_list, s)
    tile_w = BLOCK // (tiles.tile_t * tiles.tile_h)
    tiles_h = tl.cdiv(span.h, tiles.tile_h)
    tiles_w = tl.cdiv(span.w, tile_w)
    num_tiles = tl.cdiv(span.t, tiles.tile_t) * tiles_h * tiles_w
    local = program - tiles.first_entry * num_heads
    tile = local % num_tiles
    t0 = tile // (tiles_h * tiles_w) * tiles.tile_t
    h0 = tile // tiles_w % tiles_h * tiles.tile_h
    w0 = tile % tiles_w * tile_w

    lane = tl.arange(0, BLOCK)
    i_t = t0 + lane // (tiles.tile_h * tile_w)
    i_h = h0 + lane // tile_w % tiles.tile_h
    i_w = w0 + lane % tile_w
    inside = (i_t < span.t) & (i_h < span.h) & (i_w < span.w)
    token = tl.where(inside, span.begin + (i_t * span.h + i_h) * span.w + i_w, num_tokens)

    size_t = tl.where(span.windowed, window.t, 0)
    size_h = tl.where(span.windowed, window.h, 0)
    size_w = tl.where(span.windowed, window.w, 0)
    causal_t = span.windowed & causal.t
    causal_h = span.windowed & causal.h
    causal_w = span.windowed & causal.w
    windows = Axes(
        axis_window(i_t, span.t, size_t, causal_t, OF_KEYS),
        axis_window(i_h, span.h, size_h, causal_h, OF_KEYS),
        axis_window(i_w, span.w, size_w, causal_w, OF_KEYS),
    )
    box_t, num_t = tile_window(t0, t0 + tiles.tile_t, span.t, size_t, causal_t, OF_KEYS)
    box_h, num_h = tile_window(h0, h0 + tiles.tile_h, span.h, size_h, causal_h, OF_KEYS)
    box_w, num_w = tile_window(w0, w0 + tile_w, span.w, size_w, causal_w, OF_KEYS)

    # The slack attends to nothing: its sample's boundaries are 0.
    size = span.t * span.h * span.w
    num_hw = tl.maximum(num_h * num_w, 1)
    num_others = tiles.sample_end - tiles.sample_begin - tl.where(s < num_spans, size, 0)
    box_size = tl.where(s < num_spans, num_t * num_hw, 0)
    box = Box(box_t, box_h, box_w, divisor(num_hw), divisor(tl.maximum(num_w, 1)))
    others = Range(
        num_tokens=num_others + box_size,
        num_others=num_others,
        before=span.begin - tiles.sample_begin,
        span_size=size,
        span_begin=span.begin,
        sample_begin=tiles.sample_begin,
        h=span.h,
        w=span.w,
        box=box,
    )
    return Tile(local // num_tiles, token, windows, others)


@triton.jit
def within(position, window):
    """[owners, BLOCK]: which positions along an axis are in which owner's window."""
    return (position[None, :] >= window.begin[:, None]) & (position[None, :] < window.end[:, None])


@triton.jit
def other_tokens(tile, first, num_tokens, BLOCK: tl.constexpr):
    """Tokens first .. first + BLOCK of tile.others (num_tokens past its end), and [owners, BLOCK] which of them belong together."""
    others = tile.others
    index = first + tl.arange(0, BLOCK)
    is_other = index < others.num_others
    i_t, in_frame = divide(tl.maximum(index - others.num_others, 0), others.box.frame)
    i_h, i_w = divide(in_frame, others.box.row)
    i_t += others.box.t
    i_h += others.box.h
    i_w += others.box.w
    token = tl.where(
        is_other,
        others.sample_begin + index + tl.where(index < others.before, 0, others.span_size),
        others.span_begin + (i_t * others.h + i_h) * others.w + i_w,
    )
    inside = index < others.num_tokens
    near = within(i_t, tile.windows.t) & within(i_h, tile.windows.h) & within(i_w, tile.windows.w)
    return tl.where(inside, token, num_tokens), (is_other[None, :] | near) & inside[None, :]


@triton.jit
def gather(x, head, token, num_tokens, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [tokens, BLOCK_D] of a head of x [N, H, d]."""
    cols = tl.arange(0, BLOCK_D)
    p_block = x.pointer + head.to(tl.int64) * x.head_stride + token.to(tl.int64)[:, None] * x.token_stride + cols[None, :]
    return tl.load(p_block, mask=(token < num_tokens)[:, None] & (cols < D)[None, :], other=0.0)


@triton.jit
def scatter(x, head, token, num_tokens, value, D: tl.constexpr):
    cols = tl.arange(0, value.shape[1])
    p_block = x.pointer + head.to(tl.int64) * x.head_stride + token.to(tl.int64)[:, None] * x.token_stride + cols[None, :]
    tl.store(p_block, value.to(x.pointer.dtype.element_ty), mask=(token < num_tokens)[:, None] & (cols < D)[None, :])


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q, k, v, out, p_statistics, layout, p_list, window, causal, scale, num_spans, num_tokens, num_heads,
    GROUP: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    layout, window, causal = Layout(*layout), Axes(*window), Axes(*causal)
    q, k, v, out = strided(q, UNIT), strided(k, UNIT), strided(v, UNIT), strided(out, UNIT)
    for program in range(tl.program_id(0), num_entries(p_list, num_spans) * num_heads, tl.num_programs(0)):
        tile = locate_tile(layout, p_list, program, window, causal, num_spans, num_tokens, num_heads, BLOCK_M, False)
        head, token = tile.head, tile.token
        block = gather(q, head, token, num_tokens, D, BLOCK_D)
        state = start_softmax(BLOCK_M, BLOCK_D)
        for first in range(0, tile.others.num_tokens, BLOCK_N):
            other, together = other_tokens(tile, first, num_tokens, BLOCK_N)
            keys = gather(k, head // GROUP, other, num_tokens, D, BLOCK_D)
            values = gather(v, head // GROUP, other, num_tokens, D, BLOCK_D)
            scores = scores_of(tl.dot(block, tl.trans(keys), input_precision=PRECISION), together, scale, PLAIN)
            state = softmax_step(state, scores, exponent_factor(scale, PLAIN), values, True, PRECISION)
        divisors = tl.where(state.total == 0, 1.0, state.total)
        scatter(out, head, token, num_tokens, state.acc / divisors[:, None], D)
        num_rows = tl.cast(num_heads, tl.int64) * num_tokens
        store_softmax(Statistics(p_statistics + head.to(tl.int64) * num_tokens, num_rows), token, token < num_tokens, state)


@triton.jit(do_not_specialize=SIZES)
def dq_kernel(
    dout, q, k, v, out, p_statistics, p_delta, dq, layout, p_list, window, causal, scale, num_spans, num_tokens, num_heads,
    GROUP: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    layout, window, causal = Layout(*layout), Axes(*window), Axes(*causal)
    q, k, v, out = strided(q, UNIT), strided(k, UNIT), strided(v, UNIT), strided(out, UNIT)
    dout, dq = strided(dout, UNIT), strided(dq, UNIT)
    for program in range(tl.program_id(0), num_entries(p_list, num_spans) * num_heads, tl.num_programs(0)):
        tile = locate_tile(layout, p_list, program, window, causal, num_spans, num_tokens, num_heads, BLOCK_M, False)
        head, token = tile.head, tile.token
        block = gather(q, head, token, num_tokens, D, BLOCK_D)
        dout_block = gather(dout, head, token, num_tokens, D, BLOCK_D)
        out_block = gather(out, head, token, num_tokens, D, BLOCK_D)
        offset = head.to(tl.int64) * num_tokens
        statistics = Statistics(p_statistics + offset, tl.cast(num_heads, tl.int64) * num_tokens)
        maximum, inverse = load_softmax(statistics, token, token < num_tokens)
        EXACT: tl.constexpr = block.dtype == tl.float32
        if EXACT:
            delta = tl.sum(dout_block.to(tl.float64) * out_block.to(tl.float64), axis=1).to(tl.float32)
        else:
            delta = tl.sum(dout_block.to(tl.float32) * out_block.to(tl.float32), axis=1)
        count = tile.others.num_tokens
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for first in range(0, count, BLOCK_N):
            other, together = other_tokens(tile, first, num_tokens, BLOCK_N)
            keys = gather(k, head // GROUP, other, num_tokens, D, BLOCK_D)
            values = gather(v, head // GROUP, other, num_tokens, D, BLOCK_D)
            scores = scores_of(tl.dot(block, tl.trans(keys), input_precision=PRECISION), together, scale, PLAIN)
            p = probabilities(scores, exponent_factor(scale, PLAIN), maximum[:, None], inverse[:, None])
            dp = tl.dot(dout_block, tl.trans(values), input_precision=PRECISION)
            if EXACT:  # one block holds all keys: see attention.py
                delta = tl.where(count <= BLOCK_N, tl.sum(p * dp, axis=1), delta)
            acc = tl.dot(dscores(p, dp, delta[:, None], scores, False).to(keys.dtype), keys, acc, input_precision=PRECISION)
        tl.store(p_delta + offset + token, delta, mask=token < num_tokens)
        scatter(dq, head, token, num_tokens, acc * scale, D)


@triton.jit(do_not_specialize=SIZES)
def dkdv_kernel(
    dout, q, k, v, p_statistics, p_delta, dk, dv, layout, p_list, window, causal, scale, num_spans, num_tokens, num_heads,
    GROUP: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    layout, window, causal = Layout(*layout), Axes(*window), Axes(*causal)
    q, k, v, dout = strided(q, UNIT), strided(k, UNIT), strided(v, UNIT), strided(dout, UNIT)
    dk, dv = strided(dk, UNIT), strided(dv, UNIT)
    for program in range(tl.program_id(0), num_entries(p_list, num_spans) * num_heads, tl.num_programs(0)):
        tile = locate_tile(layout, p_list, program, window, causal, num_spans, num_tokens, num_heads, BLOCK_N, True)
        key_head, token = tile.head, tile.token
        keys = gather(k, key_head, token, num_tokens, D, BLOCK_D)
        values = gather(v, key_head, token, num_tokens, D, BLOCK_D)
        acc_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        acc_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for g in range(GROUP):
            head = key_head * GROUP + g
            offset = head.to(tl.int64) * num_tokens
            statistics = Statistics(p_statistics + offset, tl.cast(num_heads, tl.int64) * GROUP * num_tokens)
            for first in range(0, tile.others.num_tokens, BLOCK_M):
                other, together = other_tokens(tile, first, num_tokens, BLOCK_M)
                queries = gather(q, head, other, num_tokens, D, BLOCK_D)
                douts = gather(dout, head, other, num_tokens, D, BLOCK_D)
                maximum, inverse = load_softmax(statistics, other, other < num_tokens)
                delta = tl.load(p_delta + offset + other, mask=other < num_tokens, other=0.0)
                scores = scores_of(tl.dot(keys, tl.trans(queries), input_precision=PRECISION), together, scale, PLAIN)
                p = probabilities(scores, exponent_factor(scale, PLAIN), maximum[None, :], inverse[None, :])
                acc_v = tl.dot(p.to(douts.dtype), douts, acc_v, input_precision=PRECISION)
                dp = tl.dot(values, tl.trans(douts), input_precision=PRECISION)
                ds = dscores(p, dp, delta[None, :], scores, False)
                acc_k = tl.dot(ds.to(queries.dtype), queries, acc_k, input_precision=PRECISION)
        scatter(dk, key_head, token, num_tokens, acc_k * scale, D)
        scatter(dv, key_head, token, num_tokens, acc_v, D)


class _Call:
    """What the launches of one call share."""

    def __init__(self, tensors, layout: Layout, window, causal, scale) -> None:
        q, k, *_ = tensors
        self.heads, self.key_heads, self.like = q.shape[1], k.shape[1], q
        self.layout, self.window = layout, Axes(*window)
        self.arguments = {
            "layout": tuple(layout), "window": tuple(window), "causal": tuple(causal), "scale": scale,
            "num_spans": layout.grid.shape[0], "num_tokens": q.shape[0], **head_constants(*tensors), "PLAIN": scale > 0,
        }  # fmt: skip
        self.unit = self.arguments["UNIT"]

    def launch(self, name: str, kernel: Any, tensors: dict[str, Any], *, over_keys: bool = False) -> None:
        """Over tiles of queries, or of keys."""
        arguments = self.arguments
        config = attention_config(name, self.like.device, arguments["D"], self.like.element_size())
        block, heads = (config["BLOCK_N"], self.key_heads) if over_keys else (config["BLOCK_M"], self.heads)
        num_spans, num_tokens = arguments["num_spans"], arguments["num_tokens"]
        entries, capacity = tile_list(self.layout, self.window, num_spans, num_tokens, block)
        # The host does not know how many tiles there are: as many programs as run at once take them in turn.
        programs = min(heads * capacity, 2 * num_multiprocessors(self.like.device))
        kernel[(programs,)](p_list=entries, num_heads=heads, **tensors, **arguments, **config)


def spatiotemporal_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_spans: Tensor, grid: Tensor, step: Tensor, window: Sequence[int],
    causal: Sequence[bool], scale: float, out: Tensor, statistics: Tensor,
) -> None:  # fmt: skip
    call = _Call((q, k, v, out), Layout(cu_seqlens, cu_spans, grid, step), window, causal, scale)
    call.launch("window_forward", forward_kernel, {"p_statistics": statistics, **head_tensors(call.unit, q=q, k=k, v=v, out=out)})


def spatiotemporal_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Tensor, cu_seqlens: Tensor, cu_spans: Tensor,
    grid: Tensor, step: Tensor, window: Sequence[int], causal: Sequence[bool], scale: float, dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    call = _Call((q, k, v, out, dout), Layout(cu_seqlens, cu_spans, grid, step), window, causal, scale)
    delta = torch.empty_like(statistics[0])
    inputs = {"p_statistics": statistics, "p_delta": delta, **head_tensors(call.unit, dout=dout, q=q, k=k, v=v)}
    call.launch("window_dq", dq_kernel, {**inputs, **head_tensors(call.unit, out=out, dq=dq)})
    call.launch("window_dkdv", dkdv_kernel, {**inputs, **head_tensors(call.unit, dk=dk, dv=dv)}, over_keys=True)
