"""Attention within space-time windows of packed spans, forward and backward; the steps of the softmax are attention.py's.

A program owns a tile of BLOCK_M queries of one head: a box of a span's grid, 2 x 8 x 8 where the span is large enough, as a
compact tile has a small union of windows. It loops over the keys of that union, a box as well, and over those of the sample's other
spans, BLOCK_N at a time, reading rows of d elements wherever they lie. So the cost follows the window, not the span. For dk and dv
a program owns a tile of keys and loops over the queries that attend to them. Along an axis those are an interval too, so that the
same code serves both ways.

windows.py has who attends to whom. Tiles come from schedule.py's list. How many there are the host does not know, so programs take
one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    softmax_step,
    start_softmax,
    store_softmax,
    strided,
)
from .configs import attention_config, num_multiprocessors
from .schedule import Layout, num_entries, tile_list
from .windows import locate_tile, other_tokens, window_scores

SIZES = ["num_spans", "num_tokens", "num_heads"]  # a batch of another size must not compile anew


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
            other = other_tokens(tile, first, num_tokens, BLOCK_N, False)
            keys = gather(k, head // GROUP, other.token, num_tokens, D, BLOCK_D)
            values = gather(v, head // GROUP, other.token, num_tokens, D, BLOCK_D)
            scores = window_scores(tl.dot(block, tl.trans(keys), input_precision=PRECISION), tile, other, scale, PLAIN)
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
            other = other_tokens(tile, first, num_tokens, BLOCK_N, False)
            keys = gather(k, head // GROUP, other.token, num_tokens, D, BLOCK_D)
            values = gather(v, head // GROUP, other.token, num_tokens, D, BLOCK_D)
            scores = window_scores(tl.dot(block, tl.trans(keys), input_precision=PRECISION), tile, other, scale, PLAIN)
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
                other = other_tokens(tile, first, num_tokens, BLOCK_M, True)
                queries = gather(q, head, other.token, num_tokens, D, BLOCK_D)
                douts = gather(dout, head, other.token, num_tokens, D, BLOCK_D)
                maximum, inverse = load_softmax(statistics, other.token, other.token < num_tokens)
                delta = tl.load(p_delta + offset + other.token, mask=other.token < num_tokens, other=0.0)
                scores = window_scores(tl.dot(keys, tl.trans(queries), input_precision=PRECISION), tile, other, scale, PLAIN)
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
