"""Attention within space-time windows of packed spans, forward and backward; the steps of the softmax are attention.py's.

A program owns a tile of BLOCK_M queries of one head: a box of a span's grid, 2 x 8 x 8 where the span is large enough, as a
compact tile has a small union of windows. It walks that union, a box as well, and the tokens of the other spans of its sample,
BLOCK_N at a time, reading rows of d elements wherever they lie. So the cost follows the window, not the span. For dk and dv a
program owns a tile of keys and walks the queries that see them: along an axis those are an interval too, which makes the same
code serve both ways.

Tiles come from schedule.py's list. How many there are the host does not know, so programs take one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import LOG2E, by_row, dscores, head_constants, load_softmax, probabilities, softmax_step, store_softmax, strided
from .configs import attention_config, num_multiprocessors
from .schedule import load_span, tile_list

SIZES = ["num_spans", "num_tokens", "num_heads"]  # a batch of another size must not compile anew


@triton.jit
def axis_window(i, length, size, causal, SEEN_BY: tl.constexpr):
    """(first, one past the last) key that query i of an axis sees; with SEEN_BY, the queries that see key i. Size 0 is the axis."""
    size = tl.where(size == 0, length, tl.minimum(size, length))
    if SEEN_BY:
        first = tl.where(i < size, 0, i - size + 1 + size // 2)
        end = tl.where(i >= length - size, length, i + size // 2 + 1)
        return tl.where(causal, i, first), tl.where(causal, tl.minimum(i + size, length), end)
    else:
        first = tl.maximum(tl.minimum(i - size // 2, length - size), 0)
        return tl.where(causal, tl.maximum(i - size + 1, 0), first), tl.where(causal, i + 1, first + size)


@triton.jit
def reciprocal(n):
    """What `divide` needs of a divisor n >= 1."""
    return tl.full([], 0xFFFFFFFF, tl.uint32) // n.to(tl.uint32)


@triton.jit
def divide(x, n, reciprocal_n):
    """(x // n, x % n) for 0 <= x < 2**31: the product with the reciprocal is at most one too small."""
    quotient = tl.umulhi(x.to(tl.uint32), reciprocal_n).to(tl.int32)
    rest = x - quotient * n
    more = rest >= n
    return tl.where(more, quotient + 1, quotient), tl.where(more, rest - n, rest)


@triton.jit
def locate_tile(
    layout, p_list, program, window, causal, num_spans, num_tokens, num_heads, BLOCK: tl.constexpr, SEEN_BY: tl.constexpr
):
    """What program number `program`, of all tiles and heads, owns and walks.

    Returns head, the tokens [BLOCK] it owns (num_tokens past the tile's end), the windows of these tokens along each axis, and the
    walk: (steps, tokens of other spans, how many of them come before the span, the span's tokens, span's first token, sample's
    first token, grid's sizes along h and w, box's first t, h and w, tokens of the box's t and of its h with their reciprocals).
    """
    _, p_cu_spans, p_grid, p_step = layout
    s = tl.load(p_list + 5 * (num_spans + 1) + 1 + program // num_heads)
    begin, t, h, w, windowed = load_span(p_cu_spans, p_grid, p_step, s, num_spans, num_tokens)
    p_span = p_list + 5 * s
    tile_t = tl.load(p_span + 1)
    tile_h = tl.load(p_span + 2)
    tile_w = BLOCK // (tile_t * tile_h)
    tiles_h = tl.cdiv(h, tile_h)
    tiles_w = tl.cdiv(w, tile_w)
    tiles = tl.cdiv(t, tile_t) * tiles_h * tiles_w
    local = program - tl.load(p_span) * num_heads
    tile = local % tiles
    t0 = tile // (tiles_h * tiles_w) * tile_t
    h0 = tile // tiles_w % tiles_h * tile_h
    w0 = tile % tiles_w * tile_w

    lane = tl.arange(0, BLOCK)
    i_t = t0 + lane // (tile_h * tile_w)
    i_h = h0 + lane // tile_w % tile_h
    i_w = w0 + lane % tile_w
    inside = (i_t < t) & (i_h < h) & (i_w < w)
    token = tl.where(inside, begin + (i_t * h + i_h) * w + i_w, num_tokens)

    size_t = tl.where(windowed, window[0], 0)
    size_h = tl.where(windowed, window[1], 0)
    size_w = tl.where(windowed, window[2], 0)
    causal_t = windowed & causal[0]
    causal_h = windowed & causal[1]
    causal_w = windowed & causal[2]
    seen_t = axis_window(i_t, t, size_t, causal_t, SEEN_BY)
    seen_h = axis_window(i_h, h, size_h, causal_h, SEEN_BY)
    seen_w = axis_window(i_w, w, size_w, causal_w, SEEN_BY)
    box_t = axis_window(t0, t, size_t, causal_t, SEEN_BY)[0]
    box_h = axis_window(h0, h, size_h, causal_h, SEEN_BY)[0]
    box_w = axis_window(w0, w, size_w, causal_w, SEEN_BY)[0]
    num_t = axis_window(tl.minimum(t0 + tile_t, t) - 1, t, size_t, causal_t, SEEN_BY)[1] - box_t
    num_h = axis_window(tl.minimum(h0 + tile_h, h) - 1, h, size_h, causal_h, SEEN_BY)[1] - box_h
    num_w = axis_window(tl.minimum(w0 + tile_w, w) - 1, w, size_w, causal_w, SEEN_BY)[1] - box_w

    # The slack walks nothing: its sample's boundaries are 0.
    size = t * h * w
    num_hw = tl.maximum(num_h * num_w, 1)
    num_w = tl.maximum(num_w, 1)
    first = tl.load(p_span + 3)
    others = tl.load(p_span + 4) - first - tl.where(s < num_spans, size, 0)
    box_size = tl.where(s < num_spans, num_t * num_hw, 0)
    divisors = (num_hw, reciprocal(num_hw), num_w, reciprocal(num_w))
    walk = (others + box_size, others, begin - first, size, begin, first, h, w, box_t, box_h, box_w, divisors)
    return local // tiles, token, (seen_t, seen_h, seen_w), walk


@triton.jit
def walk_tokens(walk, seen, first, num_tokens, BLOCK: tl.constexpr):
    """Tokens first .. first + BLOCK of a walk (num_tokens past its end), and [owners, BLOCK] which of them belong together."""
    steps, others, before, span_size, span_begin, sample_begin, h, w, box_t, box_h, box_w, divisors = walk
    num_hw, reciprocal_hw, num_w, reciprocal_w = divisors
    index = first + tl.arange(0, BLOCK)
    is_other = index < others
    i_t, in_frame = divide(tl.maximum(index - others, 0), num_hw, reciprocal_hw)
    i_h, i_w = divide(in_frame, num_w, reciprocal_w)
    i_t += box_t
    i_h += box_h
    i_w += box_w
    token = tl.where(
        is_other, sample_begin + index + tl.where(index < before, 0, span_size), span_begin + (i_t * h + i_h) * w + i_w
    )
    inside = index < steps
    near_t = (i_t[None, :] >= seen[0][0][:, None]) & (i_t[None, :] < seen[0][1][:, None])
    near_h = (i_h[None, :] >= seen[1][0][:, None]) & (i_h[None, :] < seen[1][1][:, None])
    near_w = (i_w[None, :] >= seen[2][0][:, None]) & (i_w[None, :] < seen[2][1][:, None])
    return tl.where(inside, token, num_tokens), (is_other[None, :] | (near_t & near_h & near_w)) & inside[None, :]


@triton.jit
def gather(x, head, token, num_tokens, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [tokens, BLOCK_D] of a head; x is (pointer, (0, stride of a token, of a head))."""
    p, s = x
    cols = tl.arange(0, BLOCK_D)
    p_block = p + head.to(tl.int64) * s[2] + token.to(tl.int64)[:, None] * s[1] + cols[None, :]
    return tl.load(p_block, mask=(token < num_tokens)[:, None] & (cols < D)[None, :], other=0.0)


@triton.jit
def scatter(x, head, token, num_tokens, value, D: tl.constexpr):
    p, s = x
    cols = tl.arange(0, value.shape[1])
    p_block = p + head.to(tl.int64) * s[2] + token.to(tl.int64)[:, None] * s[1] + cols[None, :]
    tl.store(p_block, value.to(p.dtype.element_ty), mask=(token < num_tokens)[:, None] & (cols < D)[None, :])


@triton.jit
def scores_of(products, together, scale, PLAIN: tl.constexpr):
    """Scores, -inf where tokens do not belong together; a positive scale alone (PLAIN) is left to `score_factor`."""
    return tl.where(together, products if PLAIN else products * scale, float("-inf"))


@triton.jit
def score_factor(scale, PLAIN: tl.constexpr):
    return scale * LOG2E if PLAIN else LOG2E


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q, k, v, out, p_statistics, layout, p_list, window, causal, scale, num_spans, num_tokens, num_heads,
    GROUP: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    q, k, v, out = strided(q, UNIT), strided(k, UNIT), strided(v, UNIT), strided(out, UNIT)
    for program in range(tl.program_id(0), tl.load(p_list + 5 * (num_spans + 1)) * num_heads, tl.num_programs(0)):
        head, token, seen, walk = locate_tile(
            layout, p_list, program, window, causal, num_spans, num_tokens, num_heads, BLOCK_M, False
        )
        block = gather(q, head, token, num_tokens, D, BLOCK_D)
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for first in range(0, walk[0], BLOCK_N):
            other, together = walk_tokens(walk, seen, first, num_tokens, BLOCK_N)
            keys = gather(k, head // GROUP, other, num_tokens, D, BLOCK_D)
            values = gather(v, head // GROUP, other, num_tokens, D, BLOCK_D)
            scores = scores_of(tl.dot(block, tl.trans(keys), input_precision=PRECISION), together, scale, PLAIN)
            acc, m, total = softmax_step(acc, m, total, scores, score_factor(scale, PLAIN), values, True, PRECISION)
        empty = total == 0
        scatter(out, head, token, num_tokens, acc / tl.where(empty, 1.0, total)[:, None], D)
        num_rows = tl.cast(num_heads, tl.int64) * num_tokens
        store_softmax(p_statistics + head.to(tl.int64) * num_tokens, num_rows, token, token < num_tokens, m, total)


@triton.jit(do_not_specialize=SIZES)
def dq_kernel(
    dout, q, k, v, out, p_statistics, p_delta, dq, layout, p_list, window, causal, scale, num_spans, num_tokens, num_heads,
    GROUP: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    q, k, v, out = strided(q, UNIT), strided(k, UNIT), strided(v, UNIT), strided(out, UNIT)
    dout, dq = strided(dout, UNIT), strided(dq, UNIT)
    for program in range(tl.program_id(0), tl.load(p_list + 5 * (num_spans + 1)) * num_heads, tl.num_programs(0)):
        head, token, seen, walk = locate_tile(
            layout, p_list, program, window, causal, num_spans, num_tokens, num_heads, BLOCK_M, False
        )
        block = gather(q, head, token, num_tokens, D, BLOCK_D)
        dout_block = gather(dout, head, token, num_tokens, D, BLOCK_D)
        out_block = gather(out, head, token, num_tokens, D, BLOCK_D)
        offset = head.to(tl.int64) * num_tokens
        num_rows = tl.cast(num_heads, tl.int64) * num_tokens
        maximum, inverse = load_softmax(p_statistics + offset, num_rows, token, token < num_tokens)
        EXACT: tl.constexpr = block.dtype == tl.float32
        if EXACT:
            delta = tl.sum(dout_block.to(tl.float64) * out_block.to(tl.float64), axis=1).to(tl.float32)
        else:
            delta = tl.sum(dout_block.to(tl.float32) * out_block.to(tl.float32), axis=1)
        count = walk[0]
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for first in range(0, count, BLOCK_N):
            other, together = walk_tokens(walk, seen, first, num_tokens, BLOCK_N)
            keys = gather(k, head // GROUP, other, num_tokens, D, BLOCK_D)
            values = gather(v, head // GROUP, other, num_tokens, D, BLOCK_D)
            scores = scores_of(tl.dot(block, tl.trans(keys), input_precision=PRECISION), together, scale, PLAIN)
            p = probabilities(scores, score_factor(scale, PLAIN), maximum[:, None], inverse[:, None])
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
    q, k, v, dout = strided(q, UNIT), strided(k, UNIT), strided(v, UNIT), strided(dout, UNIT)
    dk, dv = strided(dk, UNIT), strided(dv, UNIT)
    for program in range(tl.program_id(0), tl.load(p_list + 5 * (num_spans + 1)) * num_heads, tl.num_programs(0)):
        key_head, token, seen, walk = locate_tile(
            layout, p_list, program, window, causal, num_spans, num_tokens, num_heads, BLOCK_N, True
        )
        keys = gather(k, key_head, token, num_tokens, D, BLOCK_D)
        values = gather(v, key_head, token, num_tokens, D, BLOCK_D)
        acc_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        acc_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for g in range(GROUP):
            head = key_head * GROUP + g
            offset = head.to(tl.int64) * num_tokens
            num_rows = tl.cast(num_heads, tl.int64) * GROUP * num_tokens
            for first in range(0, walk[0], BLOCK_M):
                other, together = walk_tokens(walk, seen, first, num_tokens, BLOCK_M)
                queries = gather(q, head, other, num_tokens, D, BLOCK_D)
                douts = gather(dout, head, other, num_tokens, D, BLOCK_D)
                maximum, inverse = load_softmax(p_statistics + offset, num_rows, other, other < num_tokens)
                delta = tl.load(p_delta + offset + other, mask=other < num_tokens, other=0.0)
                scores = scores_of(tl.dot(keys, tl.trans(queries), input_precision=PRECISION), together, scale, PLAIN)
                p = probabilities(scores, score_factor(scale, PLAIN), maximum[None, :], inverse[None, :])
                acc_v = tl.dot(p.to(douts.dtype), douts, acc_v, input_precision=PRECISION)
                dp = tl.dot(values, tl.trans(douts), input_precision=PRECISION)
                ds = dscores(p, dp, delta[None, :], scores, False)
                acc_k = tl.dot(ds.to(queries.dtype), queries, acc_k, input_precision=PRECISION)
        scatter(dk, key_head, token, num_tokens, acc_k * scale, D)
        scatter(dv, key_head, token, num_tokens, acc_v, D)


class _Call:
    """What the launches of one call share."""

    def __init__(self, tensors, cu_seqlens, cu_spans, grid, step, window, causal, scale) -> None:
        q, k, *_ = tensors
        self.heads, self.key_heads, self.like = q.shape[1], k.shape[1], q
        self.layout, self.window = (cu_seqlens, cu_spans, grid, step), tuple(window)
        self.rule = tuple(causal), scale
        self.sizes = grid.shape[0], cu_seqlens.shape[0] - 1, q.shape[0]  # spans, samples, tokens
        self.constants = {**head_constants(*tensors), "PLAIN": scale > 0}

    def by_row(self, *tensors: Tensor) -> list[tuple]:
        return [by_row(x, self.constants["UNIT"]) for x in tensors]

    def launch(self, name, kernel, tensors, *, keys: bool = False) -> None:
        """Over tiles of queries, or of keys."""
        config = attention_config(name, self.like.device, self.constants["D"], self.like.element_size())
        block, heads = (config["BLOCK_N"], self.key_heads) if keys else (config["BLOCK_M"], self.heads)
        entries, capacity = tile_list(self.layout, self.window, *self.sizes, block)
        # The host does not know how many tiles there are: as many programs as run at once take them in turn.
        programs = min(heads * capacity, 2 * num_multiprocessors(self.like.device))
        kernel[(programs,)](
            *tensors, self.layout, entries, self.window, *self.rule, self.sizes[0], self.sizes[2], heads, **self.constants, **config
        )  # fmt: skip


def spatiotemporal_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_spans: Tensor, grid: Tensor, step: Tensor, window: Sequence[int],
    causal: Sequence[bool], scale: float, out: Tensor, statistics: Tensor,
) -> None:  # fmt: skip
    call = _Call((q, k, v, out), cu_seqlens, cu_spans, grid, step, window, causal, scale)
    call.launch("window_forward", forward_kernel, (*call.by_row(q, k, v, out), statistics))


def spatiotemporal_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Tensor, cu_seqlens: Tensor, cu_spans: Tensor,
    grid: Tensor, step: Tensor, window: Sequence[int], causal: Sequence[bool], scale: float, dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    call = _Call((q, k, v, out, dout), cu_seqlens, cu_spans, grid, step, window, causal, scale)
    p_dout, p_q, p_k, p_v, p_out, p_dq, p_dk, p_dv = call.by_row(dout, q, k, v, out, dq, dk, dv)
    delta = torch.empty_like(statistics[0])
    call.launch("window_dq", dq_kernel, (p_dout, p_q, p_k, p_v, p_out, statistics, delta, p_dq))
    call.launch("window_dkdv", dkdv_kernel, (p_dout, p_q, p_k, p_v, statistics, delta, p_dk, p_dv), keys=True)
