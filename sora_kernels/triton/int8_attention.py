"""Attention of int8 queries and keys, forward: attention.py's loop over blocks of keys, behind the kernels of int8_quantize.py.

A program owns BLOCK_M queries of one head, which have one scale, and BLOCK_N keys at a time have one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import Call, Int8Scales, Keys, attend
from .common import divisors, head_tensors, lse_of, start_softmax, strided
from .int8_quantize import quantize
from .schedule import block_slot, locate, other_side
from .scores import ScoreMod, Scores, head_rows, key_range, load_rows, statistics_offset, store_rows


@triton.jit(do_not_specialize=["total_q", "total_k", "num_samples", "num_heads"])
def forward_kernel(
    q, k, v, out, p_lse, p_scales_q, p_scales_k, cu_q, cu_k, work, bias, alibi, score_mod, total_q, total_k, num_samples, num_heads,
    GROUP: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    FEATURES: tl.constexpr, PRECISION: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """QUERIES and KEYS share a scale. p_lse holds what `quantize` gives it as `shift`, and gets lse."""
    tl.static_assert(QUERIES % BLOCK_M == 0 and KEYS % BLOCK_N == 0)
    score_mod = ScoreMod(*score_mod)
    LAST_FIRST: tl.constexpr = FEATURES.right and not FEATURES.left
    sample, head, first, begin_q, num_q = locate(cu_q, work, total_q, num_samples, num_heads, BLOCK_M, LAST_FIRST)
    if sample < 0:
        return
    begin_k, num_k = other_side(cu_k, work, sample, total_k, num_samples)
    key_heads = num_heads // GROUP
    slot_q = block_slot(work, sample, begin_q, num_q, first, QUERIES).to(tl.int64)
    slot_k = block_slot(work, sample, begin_k, num_k, 0, KEYS).to(tl.int64)
    p_scales = p_scales_k + slot_k * key_heads + head // GROUP
    scales = Int8Scales(tl.load(p_scales_q + slot_q * num_heads + head), p_scales, key_heads, KEYS)
    k = head_rows(strided(k, UNIT), sample, begin_k, head // GROUP)
    v = head_rows(strided(v, UNIT), sample, begin_k, head // GROUP)
    keys = Keys(k, v, scales)
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
    p_lse += statistics_offset(work, sample, begin_q, head, num_heads, total_q)
    shift = tl.load(p_lse + row, mask=row < num_q, other=0.0).to(tl.float64) * score_mod.softmax_scale
    unit = score_mod.softmax_scale if FEATURES.scale_last else 1.0
    tl.store(p_lse + row, lse_of(state, unit, shift), mask=row < num_q)


def int8_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, bias: Tensor | None, scale: float, left: int,
    right: int, block_q: int, block_k: int, out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    q_int8, k_int8 = (torch.empty(x.shape, dtype=torch.int8, device=x.device) for x in (q, k))
    call = Call((q, k, v, out, q_int8, k_int8), cu_q, cu_k, bias, None, scale, left, right, 0.0)
    call.arguments["BLOCK_D"] = max(call.arguments["BLOCK_D"], 32)  # as many numbers as a matrix instruction adds up
    numbers, in_int8 = head_tensors(call.unit, q=q, k=k), head_tensors(call.unit, q=q_int8, k=k_int8)
    scales_q, scales_k = quantize(call, numbers["q"], numbers["k"], in_int8["q"], in_int8["k"], lse, block_q, block_k)
    inputs = {"p_scales_q": scales_q, "p_scales_k": scales_k, "QUERIES": block_q, "KEYS": block_k, **in_int8}
    call.launch("int8_forward", forward_kernel, {"p_lse": lse, **inputs, **head_tensors(call.unit, v=v, out=out)})
