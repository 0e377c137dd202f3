"""Block-sparse attention, forward and backward; the steps of the softmax are attention.py's.

Forward and for dq, a program owns up to BLOCK_M queries of one block and loops over the list of blocks of keys that it sees,
BLOCK_N keys at a time. For dk and dv it owns up to BLOCK_N keys and loops over the blocks of queries that see them, which are
listed as well. Blocks may have any number of tokens: a larger one is owned and met in parts, and what a part lacks is masked.

After the last block, one more row of programs writes the zeros of the tokens that no block has.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import head_statistics
from .common import (
    HeadTensor,
    Statistics,
    divisors,
    dscores,
    exponent_factor,
    head_constants,
    head_tensors,
    load_softmax,
    lse_of,
    power_of_2,
    probabilities,
    row_range,
    scores_of,
    softmax_step,
    start_softmax,
    store_softmax,
    strided,
)
from .configs import architecture, attention_config
from .scores import head_rows, load_rows, store_rows

# A batch or a mask of another size must not compile anew.
SIZES = ["scale", "num_heads"]


class Side(NamedTuple):
    """Blocks of queries, or of keys: boundaries in tokens, how many blocks and tokens there are, and the parts of a block."""

    cu: Any
    num_blocks: Any
    num_tokens: Any
    parts: Any


class Lists(NamedTuple):
    """The blocks that each block meets: see BlockLists. From one head's lists to the next are `head_stride`, 0 if all share one."""

    offsets: Any
    indices: Any
    num_indices: Any
    head_stride: Any


class Owned(NamedTuple):
    """What a program owns: a head and tokens first .. end of a block; behind the last block, the rest of the tokens."""

    head: Any
    block: Any
    first: Any
    end: Any
    is_rest: Any


@triton.jit
def owned(side, num_heads, ROWS: tl.constexpr):
    """Programs of a head are neighbours: they meet the same blocks."""
    program = tl.program_id(0)
    a_head = side.num_blocks * side.parts + 1
    block = tl.minimum(program % a_head // side.parts, side.num_blocks)
    begin, end = row_range(side.cu, block, side.num_blocks, side.num_tokens)
    is_rest = block == side.num_blocks
    first = begin + tl.where(is_rest, 0, program % a_head % side.parts * ROWS)
    return Owned(program // a_head, block, first, end, is_rest)


@triton.jit
def list_range(lists, head, block):
    """(first, one past the last) entry of a block's list. Wrong numbers are clamped, as the host cannot read them."""
    p_list = lists.offsets + head * lists.head_stride + block
    begin = tl.minimum(tl.maximum(tl.load(p_list), 0), lists.num_indices)
    return begin, tl.maximum(tl.minimum(tl.load(p_list + 1), lists.num_indices), begin)


@triton.jit
def met_tokens(lists, side, begin, step, ROWS: tl.constexpr):
    """(first, end) of the tokens of a list's step: up to ROWS of a part of a block."""
    block = tl.load(lists.indices + begin + step // side.parts)
    block = tl.minimum(tl.maximum(block, 0), side.num_blocks - 1)
    first, end = row_range(side.cu, block, side.num_blocks, side.num_tokens)
    return first + step % side.parts * ROWS, end


@triton.jit
def statistics_of(pointer, head, num_heads, num_tokens):
    """Of a head, in contiguous [2, H, N]."""
    return Statistics(pointer + head.to(tl.int64) * num_tokens, tl.cast(num_heads, tl.int64) * num_tokens)


@triton.jit
def rows_of(x, head, first, end, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    return load_rows(head_rows(x, head * 0, head * 0, head), first, end, ROWS, D, BLOCK_D, True)


@triton.jit
def put_rows(x, head, first, end, value, D: tl.constexpr):
    store_rows(head_rows(x, head * 0, head * 0, head), first, end, value, D)


@triton.jit
def put_queries(
    out, p_lse, p_statistics, head, num_heads, num_tokens, first, end, state, scale, D: tl.constexpr, PLAIN: tl.constexpr
):
    """What the forward gives of some queries."""
    row = first + tl.arange(0, state.total.shape[0])
    put_rows(out, head, first, end, state.acc / divisors(state)[:, None], D)
    p_lse += head.to(tl.int64) * num_tokens
    tl.store(p_lse + row, lse_of(state, scale if PLAIN else 1.0, 0.0), mask=row < end)
    store_softmax(statistics_of(p_statistics, head, num_heads, num_tokens), row, row < end, state)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q, k, v, out, p_lse, p_statistics, queries, keys, lists, scale, num_heads,
    GROUP: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    queries, keys, lists = Side(*queries), Side(*keys), Lists(*lists)
    q, k, v, out = strided(q, UNIT), strided(k, UNIT), strided(v, UNIT), strided(out, UNIT)
    own = owned(queries, num_heads, BLOCK_M)
    head = own.head
    state = start_softmax(BLOCK_M, BLOCK_D)
    if own.is_rest:
        for first in range(own.first, own.end, BLOCK_M):
            put_queries(out, p_lse, p_statistics, head, num_heads, queries.num_tokens, first, own.end, state, scale, D, PLAIN)
        return
    block = rows_of(q, head, own.first, own.end, BLOCK_M, D, BLOCK_D)
    begin, end = list_range(lists, head, own.block)
    for step in range(0, (end - begin) * keys.parts):
        first, last = met_tokens(lists, keys, begin, step, BLOCK_N)
        k_block = rows_of(k, head // GROUP, first, last, BLOCK_N, D, BLOCK_D)
        v_block = rows_of(v, head // GROUP, first, last, BLOCK_N, D, BLOCK_D)
        seen = (first + tl.arange(0, BLOCK_N) < last)[None, :]
        s = scores_of(tl.dot(block, tl.trans(k_block), input_precision=PRECISION), seen, scale, PLAIN)
        state = softmax_step(state, s, exponent_factor(scale, PLAIN), v_block, True, PRECISION)
    put_queries(out, p_lse, p_statistics, head, num_heads, queries.num_tokens, own.first, own.end, state, scale, D, PLAIN)


@triton.jit(do_not_specialize=SIZES)
def dq_kernel(
    dout, dlse, q, k, v, out, p_statistics, p_delta, dq, queries, keys, lists, scale, num_heads,
    GROUP: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    queries, keys, lists = Side(*queries), Side(*keys), Lists(*lists)
    q, k, v, out = strided(q, UNIT), strided(k, UNIT), strided(v, UNIT), strided(out, UNIT)
    dout, dq = strided(dout, UNIT), strided(dq, UNIT)
    own = owned(queries, num_heads, BLOCK_M)
    head = own.head
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if own.is_rest:
        for first in range(own.first, own.end, BLOCK_M):
            put_rows(dq, head, first, own.end, acc, D)
        return
    row = own.first + tl.arange(0, BLOCK_M)
    block = rows_of(q, head, own.first, own.end, BLOCK_M, D, BLOCK_D)
    dout_block = rows_of(dout, head, own.first, own.end, BLOCK_M, D, BLOCK_D)
    out_block = rows_of(out, head, own.first, own.end, BLOCK_M, D, BLOCK_D)
    maximum, inverse = load_softmax(statistics_of(p_statistics, head, num_heads, queries.num_tokens), row, row < own.end)
    if block.dtype == tl.float32:
        delta = tl.sum(dout_block.to(tl.float64) * out_block.to(tl.float64), axis=1).to(tl.float32)
    else:
        delta = tl.sum(dout_block.to(tl.float32) * out_block.to(tl.float32), axis=1)
    if dlse is not None:
        dlse = head_rows(HeadTensor(*dlse), head * 0, head * 0, head)
        delta -= tl.load(dlse.pointer + row * dlse.stride, mask=row < own.end, other=0.0).to(tl.float32)
    tl.store(p_delta + head.to(tl.int64) * queries.num_tokens + row, delta, mask=row < own.end)
    begin, end = list_range(lists, head, own.block)
    for step in range(0, (end - begin) * keys.parts):
        first, last = met_tokens(lists, keys, begin, step, BLOCK_N)
        k_block = rows_of(k, head // GROUP, first, last, BLOCK_N, D, BLOCK_D)
        v_block = rows_of(v, head // GROUP, first, last, BLOCK_N, D, BLOCK_D)
        seen = (first + tl.arange(0, BLOCK_N) < last)[None, :]
        s = scores_of(tl.dot(block, tl.trans(k_block), input_precision=PRECISION), seen, scale, PLAIN)
        p = probabilities(s, exponent_factor(scale, PLAIN), maximum[:, None], inverse[:, None])
        dp = tl.dot(dout_block, tl.trans(v_block), input_precision=PRECISION)
        acc = tl.dot(dscores(p, dp, delta[:, None], s, False).to(k_block.dtype), k_block, acc, input_precision=PRECISION)
    put_rows(dq, head, own.first, own.end, acc * scale, D)


@triton.jit(do_not_specialize=SIZES)
def dkdv_kernel(
    dout, q, k, v, p_statistics, p_delta, dk, dv, queries, keys, lists, scale, num_heads,
    GROUP: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    queries, keys, lists = Side(*queries), Side(*keys), Lists(*lists)
    q, k, v, dout = strided(q, UNIT), strided(k, UNIT), strided(v, UNIT), strided(dout, UNIT)
    dk, dv = strided(dk, UNIT), strided(dv, UNIT)
    own = owned(keys, num_heads, BLOCK_N)
    acc_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if own.is_rest:
        for first in range(own.first, own.end, BLOCK_N):
            put_rows(dk, own.head, first, own.end, acc_k, D)
            put_rows(dv, own.head, first, own.end, acc_v, D)
        return
    k_block = rows_of(k, own.head, own.first, own.end, BLOCK_N, D, BLOCK_D)
    v_block = rows_of(v, own.head, own.first, own.end, BLOCK_N, D, BLOCK_D)
    for g in range(GROUP):
        head = own.head * GROUP + g
        statistics = statistics_of(p_statistics, head, num_heads * GROUP, queries.num_tokens)
        begin, end = list_range(lists, head, own.block)
        for step in range(0, (end - begin) * queries.parts):
            first, last = met_tokens(lists, queries, begin, step, BLOCK_M)
            row = first + tl.arange(0, BLOCK_M)
            q_block = rows_of(q, head, first, last, BLOCK_M, D, BLOCK_D)
            dout_block = rows_of(dout, head, first, last, BLOCK_M, D, BLOCK_D)
            maximum, inverse = load_softmax(statistics, row, row < last)  # of rows past the last: probabilities of 0
            delta = tl.load(p_delta + head.to(tl.int64) * queries.num_tokens + row, mask=row < last, other=0.0)
            s = tl.dot(k_block, tl.trans(q_block), input_precision=PRECISION)  # keys x queries
            s = s if PLAIN else s * scale
            p = probabilities(s, exponent_factor(scale, PLAIN), maximum[None, :], inverse[None, :])
            acc_v = tl.dot(p.to(dout_block.dtype), dout_block, acc_v, input_precision=PRECISION)
            dp = tl.dot(v_block, tl.trans(dout_block), input_precision=PRECISION)
            ds = dscores(p, dp, delta[None, :], s, False)
            acc_k = tl.dot(ds.to(q_block.dtype), q_block, acc_k, input_precision=PRECISION)
    put_rows(dk, own.head, own.first, own.end, acc_k * scale, D)
    put_rows(dv, own.head, own.first, own.end, acc_v, D)


class _Call:
    """What the launches of one call share."""

    def __init__(self, tensors, cu_blocks_q, cu_blocks_k, block_q, block_k, scale) -> None:
        q, k, *_ = tensors
        self.like, self.heads, self.key_heads = q, q.shape[1], k.shape[1]
        self.cu = cu_blocks_q, cu_blocks_k
        self.tokens = q.shape[0], k.shape[0]
        self.sizes = block_q, block_k
        self.arguments = {**head_constants(*tensors), "scale": scale, "PLAIN": scale > 0}
        self.unit = self.arguments["UNIT"]

    def launch(
        self, name: str, kernel: Any, offsets: Tensor, indices: Tensor, tensors: dict[str, Any], *, over_keys: bool = False
    ) -> None:
        """Over blocks of queries, or of keys."""
        like = self.like
        config = attention_config(name, like.device, like.shape[-1], like.element_size())
        for side, size in zip(("BLOCK_M", "BLOCK_N"), self.sizes, strict=True):
            config[side] = min(config[side], max(power_of_2(size), 16))
        owns = config["BLOCK_N"] if over_keys else config["BLOCK_M"]
        if owns <= 64 and like.element_size() == 2 and like.shape[-1] <= 128 and architecture(like.device) in ("sm90", "sm100"):
            config["num_warps"] = 4  # whose matrix unit takes as many rows
        parts = [max(triton.cdiv(size, config[side]), 1) for size, side in zip(self.sizes, ("BLOCK_M", "BLOCK_N"), strict=True)]
        queries, keys = (Side(cu, cu.shape[0] - 1, n, m) for cu, n, m in zip(self.cu, self.tokens, parts, strict=True))
        owner, heads = (keys, self.key_heads) if over_keys else (queries, self.heads)
        blocks = owner.num_blocks
        stride = 0 if offsets.shape[0] - 1 == blocks else blocks
        programs = heads * (blocks * owner.parts + 1)
        if programs and like.shape[-1]:
            kernel[(programs,)](
                queries=tuple(queries), keys=tuple(keys), lists=(offsets, indices, indices.shape[0], stride), num_heads=heads,
                **tensors, **self.arguments, **config,
            )  # fmt: skip


def block_sparse_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_blocks_q: Tensor, cu_blocks_k: Tensor, cu_samples_q: Tensor, cu_samples_k: Tensor,
    offsets: Tensor, indices: Tensor, block_q: int, block_k: int, scale: float, out: Tensor, lse: Tensor, statistics: Tensor,
) -> None:  # fmt: skip
    call = _Call((q, k, v, out), cu_blocks_q, cu_blocks_k, block_q, block_k, scale)
    heads = head_tensors(call.unit, q=q, k=k, v=v, out=out)
    call.launch("forward", forward_kernel, offsets, indices, {"p_lse": lse, "p_statistics": statistics, **heads})


def block_sparse_attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Tensor, cu_blocks_q: Tensor,
    cu_blocks_k: Tensor, cu_samples_q: Tensor, cu_samples_k: Tensor, offsets: Tensor, indices: Tensor, key_offsets: Tensor,
    key_indices: Tensor, block_q: int, block_k: int, scale: float, dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    call = _Call((q, k, v, out, dout), cu_blocks_q, cu_blocks_k, block_q, block_k, scale)
    delta = torch.empty_like(statistics[0])
    inputs = {"p_statistics": statistics, "p_delta": delta, **head_tensors(call.unit, dout=dout, q=q, k=k, v=v)}
    of_queries = {"dlse": head_statistics(dlse), **inputs, **head_tensors(call.unit, out=out, dq=dq)}
    call.launch("dq", dq_kernel, offsets, indices, of_queries)
    of_keys = {**inputs, **head_tensors(call.unit, dk=dk, dv=dv)}
    call.launch("dkdv", dkdv_kernel, key_offsets, key_indices, of_keys, over_keys=True)
