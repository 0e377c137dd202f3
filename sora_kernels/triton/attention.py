"""Attention, packed and dense, forward and backward, with an online softmax over blocks of keys.

Forward: a program owns BLOCK_M queries of one head and loops over the keys they attend to, BLOCK_N at a time; scores, maximum, sum
and output stay in registers in float32. Backward, without atomics: one kernel like the forward gives dq (and delta, the row sums of
P * dP). In another, a program owns BLOCK_N keys of one key head and loops over the queries of all its query heads for dk and dv.
Scores are computed twice, for a result that does not depend on the order in which programs run.

Which program serves which block is schedule.py's. Blocks of keys that are masked out for all queries of a block are skipped. Only
those at an edge (of the sample, the window, causality) compute a mask. Their loops are not pipelined: sm90's matrix units would
wait for each other in all of them if two pipelined loops added to the same registers.

The backward computes a row's probabilities again from the maximum and the sum that the forward stored.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    HeadTensor,
    Statistics,
    divisors,
    dscores,
    head_constants,
    head_tensors,
    load_softmax,
    lse_of,
    probabilities,
    softmax_step,
    start_softmax,
    store_softmax,
    strided,
)
from .configs import attention_config
from .schedule import locate, other_side, work_list
from .scores import (
    Features,
    HeadRows,
    ScoreMod,
    Scores,
    finish_scores,
    head_rows,
    key_range,
    load_rows,
    num_statistics,
    query_range,
    score_factor,
    statistics_offset,
    store_rows,
)

UNBOUNDED = 2**30  # as checks.side has it
# A batch of another size must not compile anew. Triton specialises all integers in tuples, so these are arguments of their own.
SIZES = ["total_q", "total_k", "num_samples", "num_heads"]


class Int8Scales(NamedTuple):
    """Of the int8 queries of a program, and of its keys: the first block's, and the stride to the next block's."""

    of_queries: Any
    pointer: Any
    stride: Any
    block: Any  # keys that share a scale: a multiple of BLOCK_N


class Keys(NamedTuple):
    k: HeadRows
    v: HeadRows
    scales: Any  # Int8Scales if q and k are int8, or None


class Queries(NamedTuple):
    """What the backward reads of queries."""

    q: HeadRows
    dout: HeadRows
    statistics: Statistics
    p_delta: Any


class QueryBlock(NamedTuple):
    """A block of them in registers; row [BLOCK_M, 1] is their number in the sample."""

    q: Any
    dout: Any
    maximum: Any
    inverse: Any
    row: Any


@triton.jit
def products(q, k, scales, first, PRECISION: tl.constexpr):
    """q.k in float32, for keys `first` and after."""
    if scales is None:
        return tl.dot(q, tl.trans(k), input_precision=PRECISION)
    else:
        scale = scales.of_queries * tl.load(scales.pointer + first // scales.block * scales.stride)
        return tl.dot(q, tl.trans(k)).to(tl.float32) * scale


@triton.jit
def attend(
    state, q, i, keys, scores, begin, end,
    D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, FEATURES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The keys from begin to end into the running softmax of queries i."""
    BLOCK_D: tl.constexpr = q.shape[1]
    for first in tl.range(begin, end, BLOCK_N, num_stages=1 if MASKED and not FEATURES.left else None):
        k = load_rows(keys.k, first, scores.num_k, BLOCK_N, D, BLOCK_D, MASKED)
        v = load_rows(keys.v, first, scores.num_k, BLOCK_N, D, BLOCK_D, MASKED)
        s = products(q, k, keys.scales, first, PRECISION)
        j = first + tl.arange(0, BLOCK_N)[None, :]
        s, _ = finish_scores(s, i, j, scores, MASKED, FEATURES)
        factor = score_factor(scores.score_mod, FEATURES)
        state = softmax_step(state, s, factor, v, MASKED or scores.bias is not None, PRECISION)
    return state


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q, k, v, out, p_lse, p_statistics, cu_q, cu_k, work, bias, alibi, score_mod, total_q, total_k, num_samples, num_heads,
    GROUP: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    FEATURES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    score_mod = ScoreMod(*score_mod)
    LAST_FIRST: tl.constexpr = FEATURES.right and not FEATURES.left
    sample, head, first, begin_q, num_q = locate(cu_q, work, total_q, num_samples, num_heads, BLOCK_M, LAST_FIRST)
    if sample < 0:
        return
    begin_k, num_k = other_side(cu_k, work, sample, total_k, num_samples)
    k = head_rows(strided(k, UNIT), sample, begin_k, head // GROUP)
    v = head_rows(strided(v, UNIT), sample, begin_k, head // GROUP)
    keys = Keys(k, v, None)
    scores = Scores(num_q, num_k, sample, head, bias, alibi, score_mod)
    block = load_rows(head_rows(strided(q, UNIT), sample, begin_q, head), first, num_q, BLOCK_M, D, BLOCK_D, True)
    row = first + tl.arange(0, BLOCK_M)
    i = row[:, None]
    state = start_softmax(BLOCK_M, BLOCK_D)
    begin, full_end, end = key_range(first, scores, BLOCK_M, BLOCK_N, FEATURES)
    if not FEATURES.left:
        state = attend(state, block, i, keys, scores, begin, full_end, D, BLOCK_N, False, FEATURES, PRECISION)
        begin = full_end
    state = attend(state, block, i, keys, scores, begin, end, D, BLOCK_N, True, FEATURES, PRECISION)
    store_rows(head_rows(strided(out, UNIT), sample, begin_q, head), first, num_q, state.acc / divisors(state)[:, None], D)
    unit = score_mod.softmax_scale if FEATURES.scale_last else 1.0
    offset = statistics_offset(work, sample, begin_q, head, num_heads, total_q)
    tl.store(p_lse + offset + row, lse_of(state, unit, 0.0), mask=row < num_q)
    statistics = Statistics(p_statistics + offset, num_statistics(work, num_samples, num_heads, total_q))
    store_softmax(statistics, row, row < num_q, state)


@triton.jit
def query_grads(
    dq, delta, block, keys, scores, begin, end,
    D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, ONLY_DELTA: tl.constexpr, FEATURES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of the keys from begin to end; with ONLY_DELTA, the row sums of P * dP over them instead."""
    BLOCK_D: tl.constexpr = block.q.shape[1]
    for first in tl.range(begin, end, BLOCK_N, num_stages=1 if MASKED and not FEATURES.left else None):
        k = load_rows(keys.k, first, scores.num_k, BLOCK_N, D, BLOCK_D, MASKED)
        v = load_rows(keys.v, first, scores.num_k, BLOCK_N, D, BLOCK_D, MASKED)
        s = tl.dot(block.q, tl.trans(k), input_precision=PRECISION)
        j = first + tl.arange(0, BLOCK_N)[None, :]
        s, t = finish_scores(s, block.row, j, scores, MASKED, FEATURES)
        p = probabilities(s, score_factor(scores.score_mod, FEATURES), block.maximum[:, None], block.inverse[:, None])
        dp = tl.dot(block.dout, tl.trans(v), input_precision=PRECISION)
        if ONLY_DELTA:
            delta += tl.sum(p * dp, axis=1)
        else:
            ds = dscores(p, dp, delta[:, None], t, FEATURES.softcap)
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    if ONLY_DELTA:
        return delta
    else:
        return dq


@triton.jit(do_not_specialize=SIZES)
def dq_kernel(
    dout, dlse, q, k, v, out, p_statistics, p_delta, dq, cu_q, cu_k, work, bias, alibi, score_mod, total_q, total_k, num_samples,
    num_heads,
    GROUP: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    FEATURES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    score_mod = ScoreMod(*score_mod)
    LAST_FIRST: tl.constexpr = FEATURES.right and not FEATURES.left
    sample, head, first, begin_q, num_q = locate(cu_q, work, total_q, num_samples, num_heads, BLOCK_M, LAST_FIRST)
    if sample < 0:
        return
    begin_k, num_k = other_side(cu_k, work, sample, total_k, num_samples)
    k = head_rows(strided(k, UNIT), sample, begin_k, head // GROUP)
    v = head_rows(strided(v, UNIT), sample, begin_k, head // GROUP)
    keys = Keys(k, v, None)
    scores = Scores(num_q, num_k, sample, head, bias, alibi, score_mod)
    q_block = load_rows(head_rows(strided(q, UNIT), sample, begin_q, head), first, num_q, BLOCK_M, D, BLOCK_D, True)
    dout_block = load_rows(head_rows(strided(dout, UNIT), sample, begin_q, head), first, num_q, BLOCK_M, D, BLOCK_D, True)
    row = first + tl.arange(0, BLOCK_M)
    offset = statistics_offset(work, sample, begin_q, head, num_heads, total_q)
    statistics = Statistics(p_statistics + offset, num_statistics(work, num_samples, num_heads, total_q))
    maximum, inverse = load_softmax(statistics, row, row < num_q)
    block = QueryBlock(q_block, dout_block, maximum, inverse, row[:, None])
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin, full_end, end = key_range(first, scores, BLOCK_M, BLOCK_N, FEATURES)

    # delta = sum_j P_j dP_j = dout . out, less the gradient of lse. For float32 the second form is summed in float64. Where one
    # block holds all keys, the first one is taken: its rounding errors are those of the dP that it is subtracted from.
    out_block = load_rows(head_rows(strided(out, UNIT), sample, begin_q, head), first, num_q, BLOCK_M, D, BLOCK_D, True)
    if q_block.dtype == tl.float32:
        delta = tl.sum(dout_block.to(tl.float64) * out_block.to(tl.float64), axis=1).to(tl.float32)
        if end - begin <= BLOCK_N:
            delta = query_grads(acc, delta * 0, block, keys, scores, begin, end, D, BLOCK_N, True, True, FEATURES, PRECISION)
    else:
        delta = tl.sum(dout_block.to(tl.float32) * out_block.to(tl.float32), axis=1)
    if dlse is not None:
        dlse = head_rows(HeadTensor(*dlse), sample, begin_q, head)
        delta -= tl.load(dlse.pointer + row * dlse.stride, mask=row < num_q, other=0.0).to(tl.float32)
    tl.store(p_delta + offset + row, delta, mask=row < num_q)

    if not FEATURES.left:
        acc = query_grads(acc, delta, block, keys, scores, begin, full_end, D, BLOCK_N, False, False, FEATURES, PRECISION)
        begin = full_end
    acc = query_grads(acc, delta, block, keys, scores, begin, end, D, BLOCK_N, True, False, FEATURES, PRECISION)
    dq = head_rows(strided(dq, UNIT), sample, begin_q, head)
    store_rows(dq, first, num_q, acc * score_mod.softmax_scale, D)


@triton.jit
def key_grads(
    dk, dv, k, v, j, queries, scores, begin, end,
    D: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr, FEATURES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of keys j by the queries from begin to end. Those past the last one have probabilities of 0 without a mask."""
    num_q = scores.num_q
    BLOCK_D: tl.constexpr = k.shape[1]
    for first in tl.range(begin, end, BLOCK_M, num_stages=1 if MASKED and not FEATURES.left else None):
        q = load_rows(queries.q, first, num_q, BLOCK_M, D, BLOCK_D, True)
        dout = load_rows(queries.dout, first, num_q, BLOCK_M, D, BLOCK_D, True)
        row = first + tl.arange(0, BLOCK_M)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # keys x queries
        s, t = finish_scores(s, row[None, :], j, scores, MASKED, FEATURES)
        maximum, inverse = load_softmax(queries.statistics, row, row < num_q)
        p = probabilities(s, score_factor(scores.score_mod, FEATURES), maximum[None, :], inverse[None, :])
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        delta = tl.load(queries.p_delta + row, mask=row < num_q, other=0.0)
        ds = dscores(p, dp, delta[None, :], t, FEATURES.softcap)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=SIZES)
def dkdv_kernel(
    dout, q, k, v, p_statistics, p_delta, dk, dv, cu_q, cu_k, work, bias, alibi, score_mod, total_q, total_k, num_samples,
    num_heads,
    GROUP: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    FEATURES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    score_mod = ScoreMod(*score_mod)
    LAST_FIRST: tl.constexpr = FEATURES.left and not FEATURES.right
    sample, key_head, first, begin_k, num_k = locate(cu_k, work, total_k, num_samples, num_heads, BLOCK_N, LAST_FIRST)
    if sample < 0:
        return
    begin_q, num_q = other_side(cu_q, work, sample, total_q, num_samples)
    q = strided(q, UNIT)
    dout = strided(dout, UNIT)
    k_block = load_rows(head_rows(strided(k, UNIT), sample, begin_k, key_head), first, num_k, BLOCK_N, D, BLOCK_D, True)
    v_block = load_rows(head_rows(strided(v, UNIT), sample, begin_k, key_head), first, num_k, BLOCK_N, D, BLOCK_D, True)
    j = (first + tl.arange(0, BLOCK_N))[:, None]
    acc_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    begin, full_begin, end = query_range(first, num_q, num_k, score_mod, BLOCK_N, BLOCK_M, FEATURES)
    for g in range(GROUP):
        head = key_head * GROUP + g
        q_rows = head_rows(q, sample, begin_q, head)
        dout_rows = head_rows(dout, sample, begin_q, head)
        offset = statistics_offset(work, sample, begin_q, head, num_heads * GROUP, total_q)
        statistics = Statistics(p_statistics + offset, num_statistics(work, num_samples, num_heads * GROUP, total_q))
        queries = Queries(q_rows, dout_rows, statistics, p_delta + offset)
        scores = Scores(num_q, num_k, sample, head, bias, alibi, score_mod)
        if FEATURES.left:
            acc_k, acc_v = key_grads(
                acc_k, acc_v, k_block, v_block, j, queries, scores, begin, end, D, BLOCK_M, True, FEATURES, PRECISION
            )
        else:
            acc_k, acc_v = key_grads(
                acc_k, acc_v, k_block, v_block, j, queries, scores, full_begin, end, D, BLOCK_M, False, FEATURES, PRECISION
            )
            if FEATURES.right:
                acc_k, acc_v = key_grads(
                    acc_k, acc_v, k_block, v_block, j, queries, scores, begin, full_begin, D, BLOCK_M, True, FEATURES, PRECISION
                )
    dk_rows = head_rows(strided(dk, UNIT), sample, begin_k, key_head)
    store_rows(dk_rows, first, num_k, acc_k * score_mod.softmax_scale, D)
    store_rows(head_rows(strided(dv, UNIT), sample, begin_k, key_head), first, num_k, acc_v, D)


def head_statistics(x: Tensor | None) -> tuple | None:
    """The fields of a HeadTensor of x [B, H, S] or [H, N]."""
    if x is None:
        return None
    sample, head, token = x.stride() if x.ndim == 3 else (0, *x.stride())
    return x, sample, token, head


class Call:
    """What the launches of one call share."""

    def __init__(self, tensors, cu_q, cu_k, bias, alibi, scale, left, right, softcap) -> None:
        q, k, *_ = tensors
        self.batch = q.shape[0] if cu_q is None else cu_q.shape[0] - 1
        self.num_q, self.num_k = (q.shape[1], k.shape[1]) if cu_q is None else (q.shape[0], k.shape[0])
        self.heads, self.key_heads = q.shape[-2], k.shape[-2]
        self.like, self.plain = q, bias is None and alibi is None and softcap == 0
        self.cu_q, self.cu_k = cu_q, cu_k
        self.features = Features(left < UNBOUNDED, right < UNBOUNDED, softcap > 0, scale_last=self.plain and scale > 0)
        self.arguments = {
            "cu_q": cu_q, "cu_k": cu_k, "total_q": self.num_q, "total_k": self.num_k, "num_samples": self.batch,
            # Side by side: Triton 3.6 loses a stride of 1 in a tuple in a tuple that holds None.
            "bias": None if bias is None else (bias, *bias.stride()),
            "alibi": None if alibi is None else (alibi, *alibi.stride()),
            "score_mod": (scale, softcap, left, right),
            "FEATURES": self.features, **head_constants(*tensors),
        }  # fmt: skip
        self.unit = self.arguments["UNIT"]
        self.lists: dict[tuple, tuple[Tensor | None, int]] = {}

    def schedule(self, over_keys: bool, block: int) -> tuple[Tensor | None, int]:
        """(work list, programs a head) over blocks of queries, or of keys; self-attention has one list for both."""
        mine, other, total, others = self.cu_q, self.cu_k, self.num_q, self.num_k
        if over_keys:
            mine, other, total, others = other, mine, others, total
        if mine is None:
            return None, self.batch * triton.cdiv(total, block)
        key = over_keys and self.cu_q is not self.cu_k, block
        if key not in self.lists:
            self.lists[key] = work_list(mine, other, total, others, block)
        return self.lists[key]

    def launch(self, name: str, kernel: Any, tensors: dict[str, Any], *, over_keys: bool = False) -> None:
        """Over blocks of queries, or of keys."""
        like = self.like
        config = attention_config(
            name, like.device, like.shape[-1], like.element_size(), plain=self.plain, windowed=self.features.left
        )  # fmt: skip
        work, blocks = self.schedule(over_keys, config["BLOCK_N"] if over_keys else config["BLOCK_M"])
        heads = self.key_heads if over_keys else self.heads
        if blocks * heads:
            kernel[(blocks * heads,)](work=work, num_heads=heads, **tensors, **self.arguments, **config)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, bias: Tensor | None, alibi: Tensor | None,
    scale: float, left: int, right: int, softcap: float, out: Tensor, lse: Tensor, statistics: Tensor,
) -> None:  # fmt: skip
    call = Call((q, k, v, out), cu_q, cu_k, bias, alibi, scale, left, right, softcap)
    heads = head_tensors(call.unit, q=q, k=k, v=v, out=out)
    call.launch("forward", forward_kernel, {"p_lse": lse, "p_statistics": statistics, **heads})


def attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Tensor, cu_q: Tensor | None,
    cu_k: Tensor | None, bias: Tensor | None, alibi: Tensor | None, scale: float, left: int, right: int, softcap: float,
    dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    call = Call((q, k, v, out, dout), cu_q, cu_k, bias, alibi, scale, left, right, softcap)
    delta = torch.empty_like(statistics[0])
    inputs = {"p_statistics": statistics, "p_delta": delta, **head_tensors(call.unit, dout=dout, q=q, k=k, v=v)}
    call.launch("dq", dq_kernel, {"dlse": head_statistics(dlse), **inputs, **head_tensors(call.unit, out=out, dq=dq)})
    call.launch("dkdv", dkdv_kernel, {**inputs, **head_tensors(call.unit, dk=dk, dv=dv)}, over_keys=True)
