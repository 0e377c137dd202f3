"""Attention, packed and dense, forward and backward, with an online softmax over blocks of keys.

Forward: a program owns BLOCK_M queries of one head and walks the keys they see, BLOCK_N at a time; scores, maximum, sum and output
stay in registers in float32. Backward, without atomics: one kernel like the forward gives dq (and delta, the row sums of P * dP),
then in another a program owns BLOCK_N keys of one key head and walks the queries of all its query heads for dk and dv. Scores are
computed twice, for a result that does not depend on the order in which programs run.

Packed batches are scheduled from a list on the device: an entry for each block of queries of a real sample, the samples that cost
most first, so that the last programs to finish are short ones and the host never reads a boundary. Blocks count from a sample's
first token, so a sample's result does not depend on what it is packed with. Blocks of keys that no query of the block sees are
never visited, and only those at an edge (of the sample, the window, causality) compute a mask.

Scores are kept in units of log2(e), for exp2. lse is float64: the backward recomputes a row's probabilities from this one number.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    LN2,
    LOG2E,
    OPTIONS,
    dscores,
    input_precision,
    load_lse,
    num_slots,
    power_of_2,
    probabilities,
    softmax_step,
    tanh,
)  # fmt: skip
from .configs import attention_config

UNBOUNDED = 2**30  # as the story file decodes a window side without a limit


@triton.jit(do_not_specialize=["num_samples", "num_tokens", "capacity"])
def work_list_kernel(p_cu, p_cost, p_list, num_samples, num_tokens, capacity, BLOCK: tl.constexpr, SAMPLES: tl.constexpr):
    """list[i] is the sample of entry i, -1 for none; list[capacity + b] the first entry of sample b.

    Samples come by falling length in p_cost (the other side's boundaries: what an entry costs), the slack past the last one at the
    end. Program b writes the entries of sample b, program num_samples those of the slack, and the last one the rest.
    """
    b = tl.program_id(0)
    begin = tl.load(p_cu + tl.minimum(b, num_samples))
    end = tl.load(p_cu + b + 1, mask=b < num_samples, other=num_tokens)
    cost = tl.load(p_cost + b + 1, mask=b < num_samples, other=-1) - tl.load(p_cost + b, mask=b < num_samples, other=0)
    start = begin * 0
    for first in range(0, num_samples, SAMPLES):
        c = first + tl.arange(0, SAMPLES)
        inside = c < num_samples
        blocks = tl.cdiv(tl.load(p_cu + c + 1, mask=inside, other=0) - tl.load(p_cu + c, mask=inside, other=0), BLOCK)
        other = tl.load(p_cost + c + 1, mask=inside, other=0) - tl.load(p_cost + c, mask=inside, other=0)
        before = (other > cost) | ((other == cost) & (c < b))
        start += tl.sum(tl.where(before & inside, blocks, 0), axis=0)
    count = tl.cdiv(tl.maximum(tl.minimum(end, num_tokens) - begin, 0), BLOCK)
    value = b
    if b > num_samples:  # past the slack's, whose length was taken for this program's own
        start += count
        count = capacity - start
        value = b * 0 - 1
    else:
        tl.store(p_list + capacity + b, start)
    for first in range(0, count, SAMPLES):
        i = first + tl.arange(0, SAMPLES)
        tl.store(p_list + start + i, value + i * 0, mask=i < count)


@triton.jit
def locate(cu, work, num_tokens, num_samples, num_heads, BLOCK: tl.constexpr):
    """This program's (sample, head, first row of its block in the sample, sample's first row, its number of rows).

    The sample is -1 for a program without work, and num_samples for the slack.
    """
    pid = tl.program_id(0)
    if work is None:  # dense: all samples alike
        blocks = tl.cdiv(num_tokens, BLOCK)
        b = pid // (num_heads * blocks)
        local = pid % (num_heads * blocks)
        begin = b * 0
        length = begin + num_tokens
    else:
        p_list, capacity = work
        b = tl.load(p_list + pid // num_heads)
        sample = tl.maximum(b, 0)
        begin = tl.load(cu + sample)
        length = tl.load(cu + sample + 1, mask=sample < num_samples, other=num_tokens) - begin
        blocks = tl.maximum(tl.cdiv(length, BLOCK), 1)
        local = pid - tl.load(p_list + capacity + sample) * num_heads
    return b, local // blocks, local % blocks * BLOCK, begin, length


@triton.jit
def other_side(cu, work, b, num_tokens, num_samples):
    """First row and number of rows of sample b on the other side: none for the slack."""
    if work is None:
        begin = b * 0
        length = begin + num_tokens
    else:
        begin = tl.load(cu + b, mask=b < num_samples, other=0)
        length = tl.load(cu + b + 1, mask=b < num_samples, other=0) - begin
    return begin, length


@triton.jit
def row_pointer(x, b, begin, head):
    """Row `begin` of a head; x is (pointer, (stride of a batch entry, of a token, of a head))."""
    p, s = x
    return p + b.to(tl.int64) * s[0] + begin.to(tl.int64) * s[1] + head.to(tl.int64) * s[2]


@triton.jit
def load_rows(p, stride, first, num_rows, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Rows first .. first + ROWS of [num_rows, D] as [ROWS, BLOCK_D], zeros outside; in 64 bits, as an offset may pass 2**31."""
    i = tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    p_block = p + tl.cast(first, tl.int64) * stride + i[:, None] * stride + cols[None, :]
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
    p_block = p + tl.cast(first, tl.int64) * stride + i[:, None] * stride + cols[None, :]
    tl.store(p_block, x.to(p.dtype.element_ty), mask=(first + i < num_rows)[:, None] & (cols < D)[None, :])


@triton.jit
def finish_scores(s, i, j, num_q, num_k, added, rule, MASKED: tl.constexpr, RULE: tl.constexpr):
    """Scores from products q.k, for queries i and keys j, blocks that broadcast to s: (in units of log2(e), tanh of the softcap).

    added is (bias [B, H, Sq, Sk] and its strides or None, ALiBi slopes [B, H] and theirs or None, sample, head). rule is (scale,
    softcap, left, right); RULE says which of it there is: (left, right, softcap).
    """
    bias, alibi, b, head = added
    scale, softcap, left, right = rule
    distance = i + (num_k - num_q) - j
    if RULE[2]:
        t = tanh(s * (scale / softcap))
        s = t * (softcap * LOG2E)
    else:
        t = s
        s = s * (scale * LOG2E)
    if alibi is not None:
        slope = tl.load(alibi[0] + b * alibi[1][0] + head * alibi[1][1])
        s -= slope * LOG2E * tl.abs(distance).to(tl.float32)
    if bias is not None:
        p_rows = bias[0] + b.to(tl.int64) * bias[1][0] + head.to(tl.int64) * bias[1][1]
        p_block = p_rows + i.to(tl.int64) * bias[1][2] + j.to(tl.int64) * bias[1][3]
        s += tl.load(p_block, mask=(i < num_q) & (j < num_k), other=0.0) * LOG2E
    if MASKED:
        seen = j < num_k
        if RULE[0]:
            seen = seen & (distance <= left)
        if RULE[1]:
            seen = seen & (distance >= -right)
        s = tl.where(seen, s, float("-inf"))
    return s, t


@triton.jit
def key_range(first, num_q, num_k, left, right, ROWS: tl.constexpr, KEYS: tl.constexpr, RULE: tl.constexpr):
    """Keys that the queries first .. first + ROWS see: (begin, begin of those that all see, end of those, end).

    The first three are multiples of KEYS. With the sides of the window swapped, the queries that see a block of keys.
    """
    last = tl.minimum(first + ROWS, num_q) - 1
    shift = num_k - num_q
    begin = num_k * 0
    full_begin = begin
    full_end = num_k // KEYS * KEYS
    end = num_k
    if RULE[0]:
        begin = tl.minimum(tl.maximum(first + shift - left, 0), num_k) // KEYS * KEYS
        full_begin = tl.maximum(tl.cdiv(last + shift - left, KEYS) * KEYS, begin)
    if RULE[1]:
        end = tl.minimum(tl.maximum(last + shift + right + 1, 0), num_k)
        full_end = tl.minimum(tl.maximum(first + shift + right + 1, 0) // KEYS * KEYS, full_end)
    full_begin = tl.minimum(full_begin, tl.cdiv(end, KEYS) * KEYS)
    return begin, full_begin, tl.maximum(full_end, full_begin), end


@triton.jit
def attend(
    acc, m, total, q, i, keys, begin, end,
    D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, RULE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Queries i and the keys from begin to end: output, maximum and sum; keys as the kernels lay them out."""
    p_k, s_k, p_v, s_v, num_q, num_k, added, rule = keys
    BLOCK_D: tl.constexpr = q.shape[1]
    for first in range(begin, end, BLOCK_N):
        k = load_rows(p_k, s_k, first, num_k, BLOCK_N, D, BLOCK_D, MASKED)
        v = load_rows(p_v, s_v, first, num_k, BLOCK_N, D, BLOCK_D, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        j = first + tl.arange(0, BLOCK_N)[None, :]
        s, _ = finish_scores(s, i, j, num_q, num_k, added, rule, MASKED, RULE)
        acc, m, total = softmax_step(acc, m, total, s, v, MASKED or added[0] is not None, PRECISION)
    return acc, m, total


@triton.jit
def forward_kernel(
    q, k, v, out, lse, cu_q, cu_k, work, bias, alibi, rule, num_q, num_k, num_samples, num_heads,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    RULE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b, head, first, begin_q, num_q = locate(cu_q, work, num_q, num_samples, num_heads, BLOCK_M)
    if b < 0:
        return
    begin_k, num_k = other_side(cu_k, work, b, num_k, num_samples)
    p_k = row_pointer(k, b, begin_k, head // GROUP)
    p_v = row_pointer(v, b, begin_k, head // GROUP)
    keys = (p_k, k[1][1], p_v, v[1][1], num_q, num_k, (bias, alibi, b, head), rule)
    block = load_rows(row_pointer(q, b, begin_q, head), q[1][1], first, num_q, BLOCK_M, D, BLOCK_D, True)
    row = first + tl.arange(0, BLOCK_M)
    i = row[:, None]
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin, full_begin, full_end, end = key_range(first, num_q, num_k, rule[2], rule[3], BLOCK_M, BLOCK_N, RULE)
    if RULE[0]:
        acc, m, total = attend(acc, m, total, block, i, keys, begin, full_begin, D, BLOCK_N, True, RULE, PRECISION)
    acc, m, total = attend(acc, m, total, block, i, keys, full_begin, full_end, D, BLOCK_N, False, RULE, PRECISION)
    acc, m, total = attend(acc, m, total, block, i, keys, full_end, end, D, BLOCK_N, True, RULE, PRECISION)
    empty = total == 0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    store_rows(row_pointer(out, b, begin_q, head), out[1][1], first, num_q, acc, D)
    log_total = tl.log(tl.where(empty, 1.0, total).to(tl.float64))
    row_lse = tl.where(empty, float("-inf"), m.to(tl.float64) * LN2 + log_total)
    tl.store(row_pointer(lse, b, begin_q, head) + row, row_lse, mask=row < num_q)


@triton.jit
def query_grads(
    dq, q, dout, high, low, delta, i, keys, begin, end,
    D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, ONLY_DELTA: tl.constexpr, RULE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of the keys from begin to end; with ONLY_DELTA, the row sums of P * dP over them instead."""
    p_k, s_k, p_v, s_v, num_q, num_k, added, rule = keys
    BLOCK_D: tl.constexpr = q.shape[1]
    for first in range(begin, end, BLOCK_N):
        k = load_rows(p_k, s_k, first, num_k, BLOCK_N, D, BLOCK_D, MASKED)
        v = load_rows(p_v, s_v, first, num_k, BLOCK_N, D, BLOCK_D, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        j = first + tl.arange(0, BLOCK_N)[None, :]
        s, t = finish_scores(s, i, j, num_q, num_k, added, rule, MASKED, RULE)
        p = probabilities(s, high[:, None], low[:, None], q.dtype == tl.float32)
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


@triton.jit
def dq_kernel(
    dout, dlse, q, k, v, out, lse, delta_out, dq_out, cu_q, cu_k, work, bias, alibi, rule, num_q, num_k, num_samples, num_heads,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    RULE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b, head, first, begin_q, num_q = locate(cu_q, work, num_q, num_samples, num_heads, BLOCK_M)
    if b < 0:
        return
    begin_k, num_k = other_side(cu_k, work, b, num_k, num_samples)
    p_k = row_pointer(k, b, begin_k, head // GROUP)
    p_v = row_pointer(v, b, begin_k, head // GROUP)
    keys = (p_k, k[1][1], p_v, v[1][1], num_q, num_k, (bias, alibi, b, head), rule)
    q_block = load_rows(row_pointer(q, b, begin_q, head), q[1][1], first, num_q, BLOCK_M, D, BLOCK_D, True)
    dout_block = load_rows(row_pointer(dout, b, begin_q, head), dout[1][1], first, num_q, BLOCK_M, D, BLOCK_D, True)
    row = first + tl.arange(0, BLOCK_M)
    i = row[:, None]
    high, low = load_lse(row_pointer(lse, b, begin_q, head), row, num_q)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin, full_begin, full_end, end = key_range(first, num_q, num_k, rule[2], rule[3], BLOCK_M, BLOCK_N, RULE)

    # delta = sum_j P_j dP_j = dout . out, less the gradient of lse. For float32 the second form is summed in float64, but where one
    # block holds all keys the first one is taken, as its rounding errors are those of the dP that it is subtracted from.
    out_block = load_rows(row_pointer(out, b, begin_q, head), out[1][1], first, num_q, BLOCK_M, D, BLOCK_D, True)
    if q_block.dtype == tl.float32:
        delta = tl.sum(dout_block.to(tl.float64) * out_block.to(tl.float64), axis=1).to(tl.float32)
        if end - begin <= BLOCK_N:
            delta = query_grads(
                dq, q_block, dout_block, high, low, delta * 0, i, keys, begin, end, D, BLOCK_N, True, True, RULE, PRECISION
            )
    else:
        delta = tl.sum(dout_block.to(tl.float32) * out_block.to(tl.float32), axis=1)
    if dlse is not None:
        delta -= tl.load(row_pointer(dlse, b, begin_q, head) + row * dlse[1][1], mask=row < num_q, other=0.0).to(tl.float32)
    tl.store(row_pointer(delta_out, b, begin_q, head) + row, delta, mask=row < num_q)

    if RULE[0]:
        dq = query_grads(
            dq, q_block, dout_block, high, low, delta, i, keys, begin, full_begin, D, BLOCK_N, True, False, RULE, PRECISION
        )
    dq = query_grads(
        dq, q_block, dout_block, high, low, delta, i, keys, full_begin, full_end, D, BLOCK_N, False, False, RULE, PRECISION
    )
    dq = query_grads(dq, q_block, dout_block, high, low, delta, i, keys, full_end, end, D, BLOCK_N, True, False, RULE, PRECISION)
    store_rows(row_pointer(dq_out, b, begin_q, head), dq_out[1][1], first, num_q, dq * rule[0], D)


@triton.jit
def key_grads(
    dk, dv, k, v, j, queries, begin, end,
    D: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr, RULE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of keys j by the queries from begin to end."""
    p_q, s_q, p_dout, s_dout, p_lse, p_delta, num_q, num_k, added, rule = queries
    BLOCK_D: tl.constexpr = k.shape[1]
    for first in range(begin, end, BLOCK_M):
        q = load_rows(p_q, s_q, first, num_q, BLOCK_M, D, BLOCK_D, MASKED)
        dout = load_rows(p_dout, s_dout, first, num_q, BLOCK_M, D, BLOCK_D, MASKED)
        row = first + tl.arange(0, BLOCK_M)
        high, low = load_lse(p_lse, row, num_q)
        delta = tl.load(p_delta + row, mask=row < num_q, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # keys x queries
        s, t = finish_scores(s, row[None, :], j, num_q, num_k, added, rule, MASKED, RULE)
        p = probabilities(s, high[None, :], low[None, :], q.dtype == tl.float32)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        ds = dscores(p, dp, delta[None, :], t, RULE[2])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def dkdv_kernel(
    dout, q, k, v, lse, delta, dk_out, dv_out, cu_q, cu_k, work, bias, alibi, rule, num_q, num_k, num_samples, num_heads,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    RULE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b, key_head, first, begin_k, num_k = locate(cu_k, work, num_k, num_samples, num_heads, BLOCK_N)
    if b < 0:
        return
    begin_q, num_q = other_side(cu_q, work, b, num_q, num_samples)
    k_block = load_rows(row_pointer(k, b, begin_k, key_head), k[1][1], first, num_k, BLOCK_N, D, BLOCK_D, True)
    v_block = load_rows(row_pointer(v, b, begin_k, key_head), v[1][1], first, num_k, BLOCK_N, D, BLOCK_D, True)
    j = (first + tl.arange(0, BLOCK_N))[:, None]
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    SEEN_BY: tl.constexpr = (RULE[1], RULE[0], RULE[2])
    begin, full_begin, full_end, end = key_range(first, num_k, num_q, rule[3], rule[2], BLOCK_N, BLOCK_M, SEEN_BY)
    for g in range(GROUP):
        head = key_head * GROUP + g
        p_q = row_pointer(q, b, begin_q, head)
        p_dout = row_pointer(dout, b, begin_q, head)
        p_lse = row_pointer(lse, b, begin_q, head)
        p_delta = row_pointer(delta, b, begin_q, head)
        queries = (p_q, q[1][1], p_dout, dout[1][1], p_lse, p_delta, num_q, num_k, (bias, alibi, b, head), rule)
        if RULE[1]:
            dk, dv = key_grads(dk, dv, k_block, v_block, j, queries, begin, full_begin, D, BLOCK_M, True, RULE, PRECISION)
        dk, dv = key_grads(dk, dv, k_block, v_block, j, queries, full_begin, full_end, D, BLOCK_M, False, RULE, PRECISION)
        dk, dv = key_grads(dk, dv, k_block, v_block, j, queries, full_end, end, D, BLOCK_M, True, RULE, PRECISION)
    store_rows(row_pointer(dk_out, b, begin_k, key_head), dk_out[1][1], first, num_k, dk * rule[0], D)
    store_rows(row_pointer(dv_out, b, begin_k, key_head), dv_out[1][1], first, num_k, dv, D)


def by_row(x: Tensor | None) -> tuple | None:
    """x [B, S, H, d] or [N, H, d] with its strides of a batch entry, a token and a head."""
    return None if x is None else (x, ((0, *x.stride()) if x.ndim == 3 else x.stride())[:3])


def by_head(x: Tensor | None) -> tuple | None:
    """The same of [B, H, S] or [H, N]."""
    return None if x is None else (x, (0, x.stride(1), x.stride(0)) if x.ndim == 2 else (x.stride(0), x.stride(2), x.stride(1)))


def work_list(cu: Tensor | None, cost: Tensor | None, num_tokens: int, block: int) -> tuple | None:
    """(list, its capacity); None for a dense batch."""
    if cu is None:
        return None
    samples = cu.shape[0] - 1
    capacity = num_slots(num_tokens, samples, block)
    entries = cu.new_empty(capacity + samples + 1)
    work_list_kernel[(samples + 2,)](cu, cost, entries, samples, num_tokens, capacity, BLOCK=block, SAMPLES=256, **OPTIONS)
    return entries, capacity


class _Call:
    """What the launches of one call share."""

    def __init__(self, q, k, cu_q, cu_k, bias, alibi, scale, left, right, softcap) -> None:
        self.dense = cu_q is None
        self.batch = q.shape[0] if self.dense else cu_q.shape[0] - 1
        self.num_q, self.num_k = (q.shape[1], k.shape[1]) if self.dense else (q.shape[0], k.shape[0])
        self.heads, self.key_heads, d = q.shape[-2], k.shape[-2], q.shape[-1]
        self.boundaries = cu_q, cu_k
        self.arguments = (
            None if bias is None else (bias, bias.stride()),
            None if alibi is None else (alibi, alibi.stride()),
            (scale, softcap, left, right),
            self.num_q,
            self.num_k,
            self.batch,
        )
        self.constants = {
            "GROUP": self.heads // self.key_heads,
            "D": d,
            "BLOCK_D": max(power_of_2(d), 16),
            "RULE": (left < UNBOUNDED, right < UNBOUNDED, softcap > 0),
            "PRECISION": input_precision(q.dtype),
        }
        self.like, self.plain = q, bias is None and alibi is None and softcap == 0

    def launch(self, name, kernel, tensors, *, keys: bool = False) -> None:
        """Over blocks of queries, or of keys."""
        config = attention_config(name, self.like.device, self.constants["D"], self.like.element_size(), self.plain)
        cu_q, cu_k = self.boundaries
        mine, other, total, heads = (cu_k, cu_q, self.num_k, self.key_heads) if keys else (cu_q, cu_k, self.num_q, self.heads)
        block = config["BLOCK_N"] if keys else config["BLOCK_M"]
        work = work_list(mine, other, total, block)
        programs = heads * (self.batch * triton.cdiv(total, block) if work is None else work[1])
        if programs:
            kernel[(programs,)](*tensors, cu_q, cu_k, work, *self.arguments, heads, **self.constants, **config)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, bias: Tensor | None, alibi: Tensor | None,
    scale: float, left: int, right: int, softcap: float, out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    call = _Call(q, k, cu_q, cu_k, bias, alibi, scale, left, right, softcap)
    call.launch("forward", forward_kernel, (*map(by_row, (q, k, v, out)), by_head(lse)))


def attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor | None,
    cu_k: Tensor | None, bias: Tensor | None, alibi: Tensor | None, scale: float, left: int, right: int, softcap: float,
    dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    call = _Call(q, k, cu_q, cu_k, bias, alibi, scale, left, right, softcap)
    p_dout, p_q, p_k, p_v, p_out, p_dq, p_dk, p_dv = map(by_row, (dout, q, k, v, out, dq, dk, dv))
    p_lse, delta = by_head(lse), by_head(torch.empty_like(lse, dtype=torch.float32))
    call.launch("dq", dq_kernel, (p_dout, by_head(dlse), p_q, p_k, p_v, p_out, p_lse, delta, p_dq))
    call.launch("dkdv", dkdv_kernel, (p_dout, p_q, p_k, p_v, p_lse, delta, p_dk, p_dv), keys=True)
