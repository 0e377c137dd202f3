"""Attention, packed and dense, forward and backward, with an online softmax over blocks of keys.

Forward: a program owns BLOCK_M queries of one head and walks the keys they see, BLOCK_N at a time; scores, maximum, sum and output
stay in registers in float32. Backward, without atomics: one kernel like the forward gives dq (and delta, the row sums of P * dP),
then in another a program owns BLOCK_N keys of one key head and walks the queries of all its query heads for dk and dv. Scores are
computed twice, for a result that does not depend on the order in which programs run.

Which program serves which block is schedule.py's. Blocks of keys that no query of the block sees are never visited, and only those
at an edge (of the sample, the window, causality) compute a mask. Their loops are not pipelined: sm90's matrix units would wait for
each other in all of them if two pipelined loops added to the same registers.

The backward computes a row's probabilities again from the maximum and the sum that the forward stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import LOG2E, by_row, dscores, head_constants, load_softmax, probabilities, softmax_step, store_softmax, strided, tanh
from .configs import attention_config
from .schedule import locate, other_side, work_list

UNBOUNDED = 2**30  # as checks.side has it
SIZES = ["total_q", "total_k", "num_samples", "num_heads"]  # a batch of another size must not compile anew


@triton.jit
def row_pointer(x, b, begin, head):
    """Row `begin` of a head; x is (pointer, (stride of a batch entry, of a token, of a head))."""
    p, s = x
    return p + b.to(tl.int64) * s[0] + begin.to(tl.int64) * s[1] + head.to(tl.int64) * s[2]


@triton.jit
def statistics_offset(work, b, begin, head, num_heads, num_rows):
    """Of row `begin` of a head in contiguous [H, N] (packed) or [B, H, S] (dense)."""
    if work is None:
        head += b * num_heads
    return head.to(tl.int64) * num_rows + begin


@triton.jit
def num_statistics(work, num_samples, num_heads, num_rows):
    """How many queries of all heads there are: the stride from their maxima to their sums."""
    if work is None:
        num_heads *= num_samples
    return tl.cast(num_heads, tl.int64) * num_rows


@triton.jit
def load_rows(p, stride, first, num_rows, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Rows first .. first + ROWS of [num_rows, D] as [ROWS, BLOCK_D], zeros outside; in 64 bits, as an offset may pass 2**31."""
    i = tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    p_block = p + tl.cast(first, tl.int64) * stride + i.to(tl.int64)[:, None] * stride + cols[None, :]
    if MASKED:
        return tl.load(p_block, mask=(first + i < num_rows)[:, None] & (cols < D)[None, :], other=0.0)
    elif D < BLOCK_D:
        return tl.load(p_block, mask=(cols < D)[None, :], other=0.0)
    else:
        return tl.load(p_block)


@triton.jit
def store_rows(p, stride, first, num_rows, x, D: tl.constexpr):
    i = tl.arange(0, x.shape[0])
    cols = tl.arange(0, x.shape[1])
    p_block = p + tl.cast(first, tl.int64) * stride + i.to(tl.int64)[:, None] * stride + cols[None, :]
    tl.store(p_block, x.to(p.dtype.element_ty), mask=(first + i < num_rows)[:, None] & (cols < D)[None, :])


@triton.jit
def finish_scores(s, i, j, num_q, num_k, added, rule, MASKED: tl.constexpr, RULE: tl.constexpr):
    """Scores from products q.k, for queries i and keys j, blocks that broadcast to s: (scores, tanh of the softcap).

    added is (bias [B, H, Sq, Sk] and its strides or None, ALiBi slopes [B, H] and theirs or None, sample, head). rule is (scale,
    softcap, left, right); RULE says which of it there is: (left, right, softcap, whether the scale is left to `score_factor`).
    """
    bias, alibi, b, head = added
    scale, softcap, left, right = rule
    distance = i + (num_k - num_q) - j
    if RULE[2]:
        t = tanh(s * (scale / softcap))
        s = t * softcap
    else:
        t = s
        if not RULE[3]:
            s = s * scale
    if alibi is not None:
        slope = tl.load(alibi[0] + b * alibi[1][0] + head * alibi[1][1])
        s -= slope * tl.abs(distance).to(tl.float32)
    if bias is not None:
        p_rows = bias[0] + b.to(tl.int64) * bias[1][0] + head.to(tl.int64) * bias[1][1]
        p_block = p_rows + i.to(tl.int64) * bias[1][2] + j.to(tl.int64) * bias[1][3]
        s += tl.load(p_block, mask=(i < num_q) & (j < num_k), other=0.0)
    if MASKED:
        seen = j < num_k
        if RULE[0]:
            seen = seen & (distance <= left)
        if RULE[1]:
            seen = seen & (distance >= -right)
        s = tl.where(seen, s, float("-inf"))
    return s, t


@triton.jit
def score_factor(rule, RULE: tl.constexpr):
    """What scores, less their maximum, are multiplied by to be exponents of 2."""
    return rule[0] * LOG2E if RULE[3] else LOG2E


@triton.jit
def key_range(first, num_q, num_k, left, right, ROWS: tl.constexpr, KEYS: tl.constexpr, RULE: tl.constexpr):
    """Keys that the queries first .. first + ROWS see, whole blocks: (begin, end of the blocks that need no mask, end).

    With a window to the left no block is known to need none.
    """
    last = tl.minimum(first + ROWS, num_q) - 1
    shift = num_k - num_q
    begin = num_k * 0
    full_end = num_k // KEYS * KEYS
    end = num_k
    if RULE[0]:
        begin = tl.minimum(tl.maximum(first + shift - left, 0), num_k) // KEYS * KEYS
    if RULE[1]:
        end = tl.minimum(tl.maximum(last + shift + right + 1, 0), num_k)
        full_end = tl.minimum(tl.maximum(first + shift + right + 1, 0) // KEYS * KEYS, full_end)
    return begin, full_end, end


@triton.jit
def query_range(first, num_q, num_k, left, right, KEYS: tl.constexpr, ROWS: tl.constexpr, RULE: tl.constexpr):
    """Queries that see one of the keys first .. first + KEYS, whole blocks: (begin, begin of the blocks that see all, end)."""
    last = tl.minimum(first + KEYS, num_k) - 1
    shift = num_k - num_q
    begin = num_q * 0
    full_begin = begin
    end = num_q
    if RULE[1]:
        begin = tl.minimum(tl.maximum(first - shift - right, 0), num_q) // ROWS * ROWS
        full_begin = tl.minimum(tl.maximum(tl.cdiv(last - shift - right, ROWS) * ROWS, begin), tl.cdiv(num_q, ROWS) * ROWS)
    if RULE[0]:
        end = tl.minimum(tl.maximum(last - shift + left + 1, 0), num_q)
    return begin, full_begin, end


@triton.jit
def attend(
    acc, m, total, q, i, keys, begin, end,
    D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, RULE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Queries i and the keys from begin to end: output, maximum and sum; keys as the kernels lay them out."""
    p_k, s_k, p_v, s_v, num_q, num_k, added, rule = keys
    BLOCK_D: tl.constexpr = q.shape[1]
    for first in tl.range(begin, end, BLOCK_N, num_stages=1 if MASKED and not RULE[0] else None):
        k = load_rows(p_k, s_k, first, num_k, BLOCK_N, D, BLOCK_D, MASKED)
        v = load_rows(p_v, s_v, first, num_k, BLOCK_N, D, BLOCK_D, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        j = first + tl.arange(0, BLOCK_N)[None, :]
        s, _ = finish_scores(s, i, j, num_q, num_k, added, rule, MASKED, RULE)
        acc, m, total = softmax_step(acc, m, total, s, score_factor(rule, RULE), v, MASKED or added[0] is not None, PRECISION)
    return acc, m, total


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q, k, v, out, p_lse, p_statistics, cu_q, cu_k, work, bias, alibi, rule, total_q, total_k, num_samples, num_heads,
    GROUP: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    RULE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b, head, first, begin_q, num_q = locate(cu_q, work, total_q, num_samples, num_heads, BLOCK_M, RULE[1] and not RULE[0])
    if b < 0:
        return
    begin_k, num_k = other_side(cu_k, work, b, total_k, num_samples)
    q, k, v, out = strided(q, UNIT), strided(k, UNIT), strided(v, UNIT), strided(out, UNIT)
    p_k = row_pointer(k, b, begin_k, head // GROUP)
    p_v = row_pointer(v, b, begin_k, head // GROUP)
    keys = (p_k, k[1][1], p_v, v[1][1], num_q, num_k, (bias, alibi, b, head), rule)
    block = load_rows(row_pointer(q, b, begin_q, head), q[1][1], first, num_q, BLOCK_M, D, BLOCK_D, True)
    row = first + tl.arange(0, BLOCK_M)
    i = row[:, None]
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin, full_end, end = key_range(first, num_q, num_k, rule[2], rule[3], BLOCK_M, BLOCK_N, RULE)
    if not RULE[0]:
        acc, m, total = attend(acc, m, total, block, i, keys, begin, full_end, D, BLOCK_N, False, RULE, PRECISION)
        begin = full_end
    acc, m, total = attend(acc, m, total, block, i, keys, begin, end, D, BLOCK_N, True, RULE, PRECISION)
    empty = total == 0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    store_rows(row_pointer(out, b, begin_q, head), out[1][1], first, num_q, acc, D)
    unit = rule[0] if RULE[3] else 1.0
    row_lse = m.to(tl.float64) * unit + tl.log(tl.where(empty, 1.0, total).to(tl.float64))
    offset = statistics_offset(work, b, begin_q, head, num_heads, total_q)
    tl.store(p_lse + offset + row, tl.where(empty, float("-inf"), row_lse).to(tl.float32), mask=row < num_q)
    store_softmax(p_statistics + offset, num_statistics(work, num_samples, num_heads, total_q), row, row < num_q, m, total)


@triton.jit
def query_grads(
    dq, q, dout, maximum, inverse, delta, i, keys, begin, end,
    D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, ONLY_DELTA: tl.constexpr, RULE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of the keys from begin to end; with ONLY_DELTA, the row sums of P * dP over them instead."""
    p_k, s_k, p_v, s_v, num_q, num_k, added, rule = keys
    BLOCK_D: tl.constexpr = q.shape[1]
    for first in tl.range(begin, end, BLOCK_N, num_stages=1 if MASKED and not RULE[0] else None):
        k = load_rows(p_k, s_k, first, num_k, BLOCK_N, D, BLOCK_D, MASKED)
        v = load_rows(p_v, s_v, first, num_k, BLOCK_N, D, BLOCK_D, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        j = first + tl.arange(0, BLOCK_N)[None, :]
        s, t = finish_scores(s, i, j, num_q, num_k, added, rule, MASKED, RULE)
        p = probabilities(s, score_factor(rule, RULE), maximum[:, None], inverse[:, None])
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        if ONLY_DELTA:
            delta += tl.sum(p * dp, axis=1)
        else:
            ds = dscores(p, dp, delta[:, None], t, RULE[2])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    if ONLY_DELTA:
        return delta
    else:
        return dq


@triton.jit(do_not_specialize=SIZES)
def dq_kernel(
    dout, dlse, q, k, v, out, p_statistics, p_delta, dq_out, cu_q, cu_k, work, bias, alibi, rule, total_q, total_k, num_samples,
    num_heads,
    GROUP: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    RULE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b, head, first, begin_q, num_q = locate(cu_q, work, total_q, num_samples, num_heads, BLOCK_M, RULE[1] and not RULE[0])
    if b < 0:
        return
    begin_k, num_k = other_side(cu_k, work, b, total_k, num_samples)
    q, k, v, out = strided(q, UNIT), strided(k, UNIT), strided(v, UNIT), strided(out, UNIT)
    dout, dq_out = strided(dout, UNIT), strided(dq_out, UNIT)
    p_k = row_pointer(k, b, begin_k, head // GROUP)
    p_v = row_pointer(v, b, begin_k, head // GROUP)
    keys = (p_k, k[1][1], p_v, v[1][1], num_q, num_k, (bias, alibi, b, head), rule)
    q_block = load_rows(row_pointer(q, b, begin_q, head), q[1][1], first, num_q, BLOCK_M, D, BLOCK_D, True)
    dout_block = load_rows(row_pointer(dout, b, begin_q, head), dout[1][1], first, num_q, BLOCK_M, D, BLOCK_D, True)
    row = first + tl.arange(0, BLOCK_M)
    i = row[:, None]
    offset = statistics_offset(work, b, begin_q, head, num_heads, total_q)
    num_rows = num_statistics(work, num_samples, num_heads, total_q)
    maximum, inverse = load_softmax(p_statistics + offset, num_rows, row, row < num_q)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin, full_end, end = key_range(first, num_q, num_k, rule[2], rule[3], BLOCK_M, BLOCK_N, RULE)

    # delta = sum_j P_j dP_j = dout . out, less the gradient of lse. For float32 the second form is summed in float64, but where one
    # block holds all keys the first one is taken, as its rounding errors are those of the dP that it is subtracted from.
    out_block = load_rows(row_pointer(out, b, begin_q, head), out[1][1], first, num_q, BLOCK_M, D, BLOCK_D, True)
    if q_block.dtype == tl.float32:
        delta = tl.sum(dout_block.to(tl.float64) * out_block.to(tl.float64), axis=1).to(tl.float32)
        if end - begin <= BLOCK_N:
            delta = query_grads(
                dq, q_block, dout_block, maximum, inverse, delta * 0, i, keys, begin, end, D, BLOCK_N, True, True, RULE, PRECISION
            )
    else:
        delta = tl.sum(dout_block.to(tl.float32) * out_block.to(tl.float32), axis=1)
    if dlse is not None:
        delta -= tl.load(row_pointer(dlse, b, begin_q, head) + row * dlse[1][1], mask=row < num_q, other=0.0).to(tl.float32)
    tl.store(p_delta + offset + row, delta, mask=row < num_q)

    if not RULE[0]:
        dq = query_grads(
            dq, q_block, dout_block, maximum, inverse, delta, i, keys, begin, full_end, D, BLOCK_N, False, False, RULE, PRECISION
        )
        begin = full_end
    dq = query_grads(
        dq, q_block, dout_block, maximum, inverse, delta, i, keys, begin, end, D, BLOCK_N, True, False, RULE, PRECISION
    )
    store_rows(row_pointer(dq_out, b, begin_q, head), dq_out[1][1], first, num_q, dq * rule[0], D)


@triton.jit
def key_grads(
    dk, dv, k, v, j, queries, begin, end,
    D: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr, RULE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of keys j by the queries from begin to end. Those past the last one have probabilities of 0 without a mask."""
    p_q, s_q, p_dout, s_dout, of_rows, num_q, num_k, added, rule = queries
    p_statistics, num_rows, p_delta = of_rows
    BLOCK_D: tl.constexpr = k.shape[1]
    for first in tl.range(begin, end, BLOCK_M, num_stages=1 if MASKED and not RULE[0] else None):
        q = load_rows(p_q, s_q, first, num_q, BLOCK_M, D, BLOCK_D, True)
        dout = load_rows(p_dout, s_dout, first, num_q, BLOCK_M, D, BLOCK_D, True)
        row = first + tl.arange(0, BLOCK_M)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # keys x queries
        s, t = finish_scores(s, row[None, :], j, num_q, num_k, added, rule, MASKED, RULE)
        maximum, inverse = load_softmax(p_statistics, num_rows, row, row < num_q)
        p = probabilities(s, score_factor(rule, RULE), maximum[None, :], inverse[None, :])
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        delta = tl.load(p_delta + row, mask=row < num_q, other=0.0)
        ds = dscores(p, dp, delta[None, :], t, RULE[2])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=SIZES)
def dkdv_kernel(
    dout, q, k, v, p_statistics, p_delta, dk_out, dv_out, cu_q, cu_k, work, bias, alibi, rule, total_q, total_k, num_samples,
    num_heads,
    GROUP: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    RULE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b, key_head, first, begin_k, num_k = locate(cu_k, work, total_k, num_samples, num_heads, BLOCK_N, RULE[0] and not RULE[1])
    if b < 0:
        return
    begin_q, num_q = other_side(cu_q, work, b, total_q, num_samples)
    q, k, v, dout = strided(q, UNIT), strided(k, UNIT), strided(v, UNIT), strided(dout, UNIT)
    dk_out, dv_out = strided(dk_out, UNIT), strided(dv_out, UNIT)
    k_block = load_rows(row_pointer(k, b, begin_k, key_head), k[1][1], first, num_k, BLOCK_N, D, BLOCK_D, True)
    v_block = load_rows(row_pointer(v, b, begin_k, key_head), v[1][1], first, num_k, BLOCK_N, D, BLOCK_D, True)
    j = (first + tl.arange(0, BLOCK_N))[:, None]
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    begin, full_begin, end = query_range(first, num_q, num_k, rule[2], rule[3], BLOCK_N, BLOCK_M, RULE)
    for g in range(GROUP):
        head = key_head * GROUP + g
        p_q = row_pointer(q, b, begin_q, head)
        p_dout = row_pointer(dout, b, begin_q, head)
        offset = statistics_offset(work, b, begin_q, head, num_heads * GROUP, total_q)
        num_rows = num_statistics(work, num_samples, num_heads * GROUP, total_q)
        of_rows = (p_statistics + offset, num_rows, p_delta + offset)
        queries = (p_q, q[1][1], p_dout, dout[1][1], of_rows, num_q, num_k, (bias, alibi, b, head), rule)
        if RULE[0]:
            dk, dv = key_grads(dk, dv, k_block, v_block, j, queries, begin, end, D, BLOCK_M, True, RULE, PRECISION)
        else:
            dk, dv = key_grads(dk, dv, k_block, v_block, j, queries, full_begin, end, D, BLOCK_M, False, RULE, PRECISION)
            if RULE[1]:
                dk, dv = key_grads(dk, dv, k_block, v_block, j, queries, begin, full_begin, D, BLOCK_M, True, RULE, PRECISION)
    store_rows(row_pointer(dk_out, b, begin_k, key_head), dk_out[1][1], first, num_k, dk * rule[0], D)
    store_rows(row_pointer(dv_out, b, begin_k, key_head), dv_out[1][1], first, num_k, dv, D)


def by_head(x: Tensor | None) -> tuple | None:
    """x [B, H, S] or [H, N] with its strides of a batch entry, a token and a head."""
    return None if x is None else (x, (0, x.stride(1), x.stride(0)) if x.ndim == 2 else (x.stride(0), x.stride(2), x.stride(1)))


class _Call:
    """What the launches of one call share."""

    def __init__(self, tensors, cu_q, cu_k, bias, alibi, scale, left, right, softcap) -> None:
        q, k, *_ = tensors
        self.batch = q.shape[0] if cu_q is None else cu_q.shape[0] - 1
        self.num_q, self.num_k = (q.shape[1], k.shape[1]) if cu_q is None else (q.shape[0], k.shape[0])
        self.heads, self.key_heads = q.shape[-2], k.shape[-2]
        self.like, self.plain = q, bias is None and alibi is None and softcap == 0
        self.boundaries = cu_q, cu_k
        self.arguments = (
            None if bias is None else (bias, bias.stride()),
            None if alibi is None else (alibi, alibi.stride()),
            (scale, softcap, left, right),
            self.num_q,
            self.num_k,
            self.batch,
        )
        rule = left < UNBOUNDED, right < UNBOUNDED, softcap > 0, self.plain and scale > 0
        self.constants = {**head_constants(*tensors), "RULE": rule}
        self.lists: dict[tuple, tuple[Tensor | None, int]] = {}

    def by_row(self, *tensors: Tensor) -> list[tuple]:
        return [by_row(x, self.constants["UNIT"]) for x in tensors]

    def schedule(self, keys: bool, block: int) -> tuple[Tensor | None, int]:
        """(work list, programs a head) over blocks of queries, or of keys; self-attention has one list for both."""
        cu_q, cu_k = self.boundaries
        mine, other, total, others = (cu_k, cu_q, self.num_k, self.num_q) if keys else (cu_q, cu_k, self.num_q, self.num_k)
        if mine is None:
            return None, self.batch * triton.cdiv(total, block)
        key = keys and cu_q is not cu_k, block
        if key not in self.lists:
            self.lists[key] = work_list(mine, other, total, others, block)
        return self.lists[key]

    def launch(self, name, kernel, tensors, *, keys: bool = False) -> None:
        """Over blocks of queries, or of keys."""
        like, windowed = self.like, self.constants["RULE"][0]
        config = attention_config(name, like.device, like.shape[-1], like.element_size(), plain=self.plain, windowed=windowed)
        work, blocks = self.schedule(keys, config["BLOCK_N"] if keys else config["BLOCK_M"])
        heads = self.key_heads if keys else self.heads
        if blocks * heads:
            kernel[(blocks * heads,)](*tensors, *self.boundaries, work, *self.arguments, heads, **self.constants, **config)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, bias: Tensor | None, alibi: Tensor | None,
    scale: float, left: int, right: int, softcap: float, out: Tensor, lse: Tensor, statistics: Tensor,
) -> None:  # fmt: skip
    call = _Call((q, k, v, out), cu_q, cu_k, bias, alibi, scale, left, right, softcap)
    call.launch("forward", forward_kernel, (*call.by_row(q, k, v, out), lse, statistics))


def attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Tensor, cu_q: Tensor | None,
    cu_k: Tensor | None, bias: Tensor | None, alibi: Tensor | None, scale: float, left: int, right: int, softcap: float,
    dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    call = _Call((q, k, v, out, dout), cu_q, cu_k, bias, alibi, scale, left, right, softcap)
    p_dout, p_q, p_k, p_v, p_out, p_dq, p_dk, p_dv = call.by_row(dout, q, k, v, out, dq, dk, dv)
    delta = torch.empty_like(statistics[0])
    call.launch("dq", dq_kernel, (p_dout, by_head(dlse), p_q, p_k, p_v, p_out, statistics, delta, p_dq))
    call.launch("dkdv", dkdv_kernel, (p_dout, p_q, p_k, p_v, statistics, delta, p_dk, p_dv), keys=True)
