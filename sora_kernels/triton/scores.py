"""The scores of attention in blocks: how they come from products, which blocks there are, and the rows that are loaded for them."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .common import LOG2E, tanh


class Bias(NamedTuple):
    """Added to the scores, [B, H, Sq, Sk]."""

    pointer: Any
    batch_stride: Any
    head_stride: Any
    query_stride: Any
    key_stride: Any


class Slopes(NamedTuple):
    """Of ALiBi, [B, H]."""

    pointer: Any
    batch_stride: Any
    head_stride: Any


class ScoreMod(NamedTuple):
    """The numbers by which scores come from products q.k."""

    softmax_scale: Any
    softcap: Any
    left: Any  # keys before a query's own that it attends to
    right: Any  # and after


class Features(NamedTuple):
    """Which parts of a ScoreMod a kernel is compiled for."""

    left: bool
    right: bool
    softcap: bool
    scale_last: bool  # the softmax scale is left to `score_factor`


class Scores(NamedTuple):
    """The matrix of scores of one sample and head."""

    num_q: Any
    num_k: Any
    sample: Any
    head: Any
    bias: Any  # a Bias's fields, or None
    alibi: Any  # Slopes'
    score_mod: ScoreMod


class HeadRows(NamedTuple):
    """Rows [num_rows, d] of one sample and head: the first of them, and the stride from one to the next."""

    pointer: Any
    stride: Any


@triton.jit
def head_rows(x, sample, begin, head):
    """The rows of a HeadTensor from row `begin` on."""
    p_sample = x.pointer + sample.to(tl.int64) * x.batch_stride
    return HeadRows(p_sample + begin.to(tl.int64) * x.token_stride + head.to(tl.int64) * x.head_stride, x.token_stride)


@triton.jit
def statistics_offset(work, sample, begin, head, num_heads, num_rows):
    """Of row `begin` of a head in contiguous [H, N] (packed) or [B, H, S] (dense)."""
    if work is None:
        head += sample * num_heads
    return head.to(tl.int64) * num_rows + begin


@triton.jit
def num_statistics(work, num_samples, num_heads, num_rows):
    """How many queries of all heads there are: the stride from their maxima to their sums."""
    if work is None:
        num_heads *= num_samples
    return tl.cast(num_heads, tl.int64) * num_rows


@triton.jit
def load_rows(x, first, num_rows, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Rows first .. first + ROWS of [num_rows, D] as [ROWS, BLOCK_D], zeros outside; in 64 bits, as an offset may pass 2**31."""
    i = tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    p_block = x.pointer + tl.cast(first, tl.int64) * x.stride + i.to(tl.int64)[:, None] * x.stride + cols[None, :]
    if MASKED:
        return tl.load(p_block, mask=(first + i < num_rows)[:, None] & (cols < D)[None, :], other=0.0)
    elif D < BLOCK_D:
        return tl.load(p_block, mask=(cols < D)[None, :], other=0.0)
    else:
        return tl.load(p_block)


@triton.jit
def store_rows(x, first, num_rows, value, D: tl.constexpr):
    i = tl.arange(0, value.shape[0])
    cols = tl.arange(0, value.shape[1])
    p_block = x.pointer + tl.cast(first, tl.int64) * x.stride + i.to(tl.int64)[:, None] * x.stride + cols[None, :]
    tl.store(p_block, value.to(x.pointer.dtype.element_ty), mask=(first + i < num_rows)[:, None] & (cols < D)[None, :])


@triton.jit
def finish_scores(s, i, j, scores, MASKED: tl.constexpr, FEATURES: tl.constexpr):
    """Scores from products s = q.k, for queries i and keys j, blocks that broadcast to s: (scores, tanh of the softcap)."""
    score_mod = scores.score_mod
    distance = i + (scores.num_k - scores.num_q) - j
    if FEATURES.softcap:
        t = tanh(s * (score_mod.softmax_scale / score_mod.softcap))
        s = t * score_mod.softcap
    else:
        t = s
        if not FEATURES.scale_last:
            s = s * score_mod.softmax_scale
    if scores.alibi is not None:
        slopes = Slopes(*scores.alibi)
        slope = tl.load(slopes.pointer + scores.sample * slopes.batch_stride + scores.head * slopes.head_stride)
        s -= slope * tl.abs(distance).to(tl.float32)
    if scores.bias is not None:
        bias = Bias(*scores.bias)
        p_head = bias.pointer + scores.sample.to(tl.int64) * bias.batch_stride + scores.head.to(tl.int64) * bias.head_stride
        p_block = p_head + i.to(tl.int64) * bias.query_stride + j.to(tl.int64) * bias.key_stride
        s += tl.load(p_block, mask=(i < scores.num_q) & (j < scores.num_k), other=0.0)
    if MASKED:
        attends = j < scores.num_k
        if FEATURES.left:
            attends = attends & (distance <= score_mod.left)
        if FEATURES.right:
            attends = attends & (distance >= -score_mod.right)
        s = tl.where(attends, s, float("-inf"))
    return s, t


@triton.jit
def score_factor(score_mod, FEATURES: tl.constexpr):
    """What scores, less their maximum, are multiplied by to be exponents of 2."""
    return score_mod.softmax_scale * LOG2E if FEATURES.scale_last else LOG2E


@triton.jit
def key_range(first, scores, ROWS: tl.constexpr, KEYS: tl.constexpr, FEATURES: tl.constexpr):
    """Keys that queries first .. first + ROWS attend to, in whole blocks: (begin, end of the blocks that need no mask, end).

    With a window to the left no block is known to need none.
    """
    num_q = scores.num_q
    num_k = scores.num_k
    last = tl.minimum(first + ROWS, num_q) - 1
    shift = num_k - num_q
    begin = num_k * 0
    full_end = num_k // KEYS * KEYS
    end = num_k
    if FEATURES.left:
        begin = tl.minimum(tl.maximum(first + shift - scores.score_mod.left, 0), num_k) // KEYS * KEYS
    if FEATURES.right:
        right = scores.score_mod.right
        end = tl.minimum(tl.maximum(last + shift + right + 1, 0), num_k)
        full_end = tl.minimum(tl.maximum(first + shift + right + 1, 0) // KEYS * KEYS, full_end)
    return begin, full_end, end


@triton.jit
def query_range(first, num_q, num_k, score_mod, KEYS: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr):
    """Queries that attend to one of the keys first .. first + KEYS, in whole blocks: (begin, begin of the blocks that attend to
    all of them, end)."""
    last = tl.minimum(first + KEYS, num_k) - 1
    shift = num_k - num_q
    begin = num_q * 0
    full_begin = begin
    end = num_q
    if FEATURES.right:
        right = score_mod.right
        begin = tl.minimum(tl.maximum(first - shift - right, 0), num_q) // ROWS * ROWS
        full_begin = tl.minimum(tl.maximum(tl.cdiv(last - shift - right, ROWS) * ROWS, begin), tl.cdiv(num_q, ROWS) * ROWS)
    if FEATURES.left:
        end = tl.minimum(tl.maximum(last - shift + score_mod.left + 1, 0), num_q)
    return begin, full_begin, end
