"""int8 of queries and keys: for each block of rows of a head a scale, and steps of it between -127 and 127. Keys lose their mean.

A program of sum_kernel owns a block of keys of one head and sums them; one of mean_kernel adds a sample's sums. A program of
quantize_kernel owns a block again, which it reads once. Blocks count from a sample's first row, and every sum has a fixed order.

Keys less their mean m give the same probabilities, as all scores of a query q fall by the same q.m. So does lse: q.m is stored for
whoever adds it again.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import Call
from .common import OPTIONS, num_slots, strided, sum_chunks
from .schedule import block_slot, locate, other_side
from .scores import head_rows, load_rows, statistics_offset, store_rows

SIZES = ["total", "num_samples", "num_heads"]
STEPS: tl.constexpr = tl.constexpr(127.0)
SMALLEST: tl.constexpr = tl.constexpr(2.0**-100)  # of a block's largest number: its reciprocal and its scale are normal


@triton.jit(do_not_specialize=SIZES)
def sum_kernel(
    x, p_sums, cu, work, total, num_samples, num_heads, UNIT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """sums [slots, heads, D] <- of each block of rows."""
    sample, head, first, begin, length = locate(cu, work, total, num_samples, num_heads, BLOCK, False)
    if sample < 0:
        return
    rows = load_rows(head_rows(strided(x, UNIT), sample, begin, head), first, length, BLOCK, D, BLOCK_D, True).to(tl.float32)
    slot = block_slot(work, sample, begin, length, first, BLOCK).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    tl.store(p_sums + (slot * num_heads + head) * D + cols, tl.sum(rows, axis=0), mask=cols < D)


@triton.jit(do_not_specialize=SIZES)
def mean_kernel(
    p_sums, p_means, cu, work, total, num_samples, num_heads, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """means [samples, heads, D], program (sample, head). bfloat16, so that it hardly matters how the sum was rounded."""
    sample = tl.program_id(0) // num_heads
    head = tl.program_id(0) % num_heads
    begin, length = other_side(cu, work, sample, total, num_samples)
    slot = block_slot(work, sample, begin, length, 0, BLOCK)
    cols = tl.arange(0, BLOCK_D)
    width = num_heads * D
    # Columns past the head's own are another's, or past the end.
    cols_of_head = tl.where(cols < D, head * D + cols, width)
    total_of_head = sum_chunks(p_sums, slot, tl.cdiv(length, BLOCK), cols_of_head, width, 16)
    mean = tl.div_rn(total_of_head, tl.maximum(length, 1).to(tl.float32))
    tl.store(p_means + sample.to(tl.int64) * width + head * D + cols, mean.to(p_means.dtype.element_ty), mask=cols < D)


@triton.jit(do_not_specialize=SIZES)
def quantize_kernel(
    x, p_means, to, p_scales, p_shift, cu, work, total, num_samples, num_heads,
    GROUP: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Steps of one scale for each block. Keys lose their mean; for queries `p_shift` [heads, rows] gets its product with each."""
    sample, head, first, begin, length = locate(cu, work, total, num_samples, num_heads, BLOCK, False)
    if (sample < 0) | (sample == num_samples):
        return
    rows = load_rows(head_rows(strided(x, UNIT), sample, begin, head), first, length, BLOCK, D, BLOCK_D, True).to(tl.float32)
    row = first + tl.arange(0, BLOCK)
    cols = tl.arange(0, BLOCK_D)
    p_mean = p_means + (sample.to(tl.int64) * (num_heads // GROUP) + head // GROUP) * D
    mean = tl.load(p_mean + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    if p_shift is None:
        rows = tl.where((row < length)[:, None], rows - mean, 0.0)
    else:
        offset = statistics_offset(work, sample, begin, head, num_heads, total)
        tl.store(p_shift + offset + row, tl.sum(rows * mean, axis=1), mask=row < length)
    largest = tl.maximum(tl.max(tl.max(tl.abs(rows), axis=1), axis=0), SMALLEST)
    # The second term is 0, or NaN where a number is not finite, which then all scores of the block are.
    scale = largest * (1 / STEPS) + tl.sum(tl.sum(rows * 0.0, axis=1), axis=0)
    # Rounded once, as bfloat16 numbers are often in the middle of two steps.
    steps = tl.floor(tl.fma(rows, tl.div_rn(STEPS, largest), 0.5))
    store_rows(head_rows(strided(to, UNIT), sample, begin, head), first, length, steps, D)
    slot = block_slot(work, sample, begin, length, first, BLOCK).to(tl.int64)
    tl.store(p_scales + slot * num_heads + head, scale)


class _Side:
    """Queries or keys of a call, in blocks that share a scale."""

    def __init__(self, call: Call, over_keys: bool, block: int) -> None:
        self.like, self.heads, self.block = call.like, call.key_heads if over_keys else call.heads, block
        total, cu = (call.num_k, call.cu_k) if over_keys else (call.num_q, call.cu_q)
        work, blocks = call.schedule(over_keys, block)
        self.programs = blocks * self.heads
        slots = num_slots(total if cu is not None else call.batch * total, call.batch, block)
        self.scales = self.like.new_empty((slots, self.heads), dtype=torch.float32)
        self.arguments = {
            "cu": cu, "work": work, "total": total, "num_samples": call.batch, "num_heads": self.heads, "BLOCK": block,
            **{name: call.arguments[name] for name in ("D", "BLOCK_D")},
        }  # fmt: skip

    def launch(self, kernel: Any, programs: int, **arguments: Any) -> None:
        if programs:
            kernel[(programs,)](**arguments, **self.arguments, num_warps=8, **OPTIONS)


def quantize(
    call: Call, q: tuple, k: tuple, q_int8: tuple, k_int8: tuple, shift: Tensor, block_q: int, block_k: int
) -> tuple[Tensor, Tensor]:
    """Fills q_int8 and k_int8, and `shift` with the products of q and the keys' mean; returns the scales of q and of k.

    q, k, q_int8, k_int8: fields of HeadTensors.
    """
    queries, keys = _Side(call, False, block_q), _Side(call, True, block_k)
    head_dim, unit = call.like.shape[-1], call.unit
    sums = keys.scales.new_empty((*keys.scales.shape, head_dim))
    means = sums.new_empty((call.batch, keys.heads, head_dim), dtype=torch.bfloat16)
    keys.launch(sum_kernel, keys.programs, x=k, p_sums=sums, UNIT=unit)
    keys.launch(mean_kernel, call.batch * keys.heads, p_sums=sums, p_means=means)
    group = call.arguments["GROUP"]
    for side, x, to, p_shift, sharing in ((keys, k, k_int8, None, 1), (queries, q, q_int8, shift, group)):
        side.launch(
            quantize_kernel,
            side.programs,
            x=x,
            p_means=means,
            to=to,
            p_scales=side.scales,
            p_shift=p_shift,
            GROUP=sharing,
            UNIT=unit,
        )
    return queries.scales, keys.scales
