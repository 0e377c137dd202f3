"""Which program of packed attention serves which rows: a list on the device, made by a kernel, so that the host reads no boundary.

An entry stands for a block of rows of a real sample, the samples whose rows cost most first, so that the last programs to finish
are short ones. Blocks count from a sample's first row, so a sample's result does not depend on what it is packed with.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import OPTIONS, num_slots, row_range


@triton.jit(do_not_specialize=["num_samples", "num_tokens", "num_other", "capacity"])
def work_list_kernel(
    p_cu, p_cost, p_list, num_samples, num_tokens, num_other, capacity, BLOCK: tl.constexpr, SAMPLES: tl.constexpr
):  # fmt: skip
    """list[b] is the first entry of sample b, list[num_samples + 1 + i] the sample of entry i, -1 for none.

    Samples come by falling length in p_cost (the other side's boundaries: what an entry costs), the slack past the last one at the
    end, as sample num_samples. Program b writes the entries of sample b, and one more program those that stay empty.
    """
    b = tl.program_id(0)
    begin, end = row_range(p_cu, tl.minimum(b, num_samples), num_samples, num_tokens)
    cost_begin, cost_end = row_range(p_cost, tl.minimum(b, num_samples), num_samples, num_other)
    cost = tl.where(b < num_samples, cost_end - cost_begin, -1)
    start = begin * 0
    for first in range(0, num_samples, SAMPLES):
        c = first + tl.arange(0, SAMPLES)
        inside = c < num_samples
        c_begin, c_end = row_range(p_cu, tl.minimum(c, num_samples), num_samples, num_tokens)
        other_begin, other_end = row_range(p_cost, tl.minimum(c, num_samples), num_samples, num_other)
        other = other_end - other_begin
        before = (other > cost) | ((other == cost) & (c < b))
        start += tl.sum(tl.where(before & inside, tl.cdiv(c_end - c_begin, BLOCK), 0), axis=0)
    count = tl.cdiv(end - begin, BLOCK)
    value = b
    if b > num_samples:  # past the slack's, whose length was taken for this program's own
        start += count
        count = capacity - start
        value = b * 0 - 1
    else:
        tl.store(p_list + b, start)
    p_entries = p_list + num_samples + 1
    for first in range(0, count, SAMPLES):
        i = first + tl.arange(0, SAMPLES)
        tl.store(p_entries + start + i, value + i * 0, mask=(i < count) & (start + i < capacity))


@triton.jit
def locate(cu, p_list, num_tokens, num_samples, num_heads, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """This program's (sample, head, first row of its block in the sample, sample's first row, its number of rows).

    The sample is -1 for a program without work, and num_samples for the slack. LAST_FIRST takes a sample's blocks from its end.
    """
    pid = tl.program_id(0)
    if p_list is None:  # dense: all samples alike
        blocks = tl.cdiv(num_tokens, BLOCK)
        b = pid // (num_heads * blocks)
        local = pid % (num_heads * blocks)
        begin = b * 0
        length = begin + num_tokens
    else:
        b = tl.load(p_list + num_samples + 1 + pid // num_heads)
        sample = tl.maximum(b, 0)
        begin, end = row_range(cu, sample, num_samples, num_tokens)
        length = end - begin
        blocks = tl.maximum(tl.cdiv(length, BLOCK), 1)
        local = pid - tl.load(p_list + sample) * num_heads
    block = local % blocks
    if LAST_FIRST:
        block = blocks - 1 - block
    return b, local // blocks, block * BLOCK, begin, length


@triton.jit
def other_side(cu, p_list, b, num_tokens, num_samples):
    """First row and number of rows of sample b on the other side: none for the slack."""
    if p_list is None:
        begin = b * 0
        length = begin + num_tokens
    else:
        begin, end = row_range(cu, b, num_samples, num_tokens)
        length = tl.where(b < num_samples, end - begin, 0)
    return begin, length


def work_list(cu: Tensor, other: Tensor, num_tokens: int, num_other: int, block: int) -> tuple[Tensor, int]:
    """(list, its number of entries)."""
    samples = cu.shape[0] - 1
    capacity = num_slots(num_tokens, samples, block)
    entries = cu.new_empty(samples + 1 + capacity)
    work_list_kernel[(samples + 2,)](
        cu, other, entries, samples, num_tokens, num_other, capacity, BLOCK=block, SAMPLES=256, **OPTIONS
    )  # fmt: skip
    return entries, capacity
