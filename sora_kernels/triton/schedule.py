"""Which program of attention serves which rows of a packed batch: a list on the device, so that the host reads no boundary.

An entry stands for a block of rows of a real sample, or within windows for a tile of a span, those that cost most first, so that
the last programs to finish are short ones. Blocks count from a sample's first row, so a sample's result does not depend on what it
is packed with.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import OPTIONS, find_row, num_slots, row_range


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


# ---- windows: tiles of spans


@triton.jit
def _power_of_2(n, BLOCK: tl.constexpr):
    """The least power of two that is at least n, between 1 and BLOCK."""
    x = n - 1
    x |= x >> 1
    x |= x >> 2
    x |= x >> 4
    x |= x >> 8
    x |= x >> 16
    return tl.minimum(tl.maximum(x + 1, 1), BLOCK)


@triton.jit
def tile_shape(t, h, w, BLOCK: tl.constexpr):
    """A tile's sizes on a span's grid, powers of two with product BLOCK: 8 wide and high if the span is, the rest along time."""
    tile_w = tl.minimum(_power_of_2(w, BLOCK), 8)
    tile_h = tl.minimum(tl.minimum(_power_of_2(h, BLOCK), 8), BLOCK // tile_w)
    tile_t = tl.minimum(_power_of_2(t, BLOCK), BLOCK // (tile_w * tile_h))
    tile_w = tl.minimum(_power_of_2(w, BLOCK), BLOCK // (tile_t * tile_h))
    tile_h = tl.minimum(_power_of_2(h, BLOCK), BLOCK // (tile_t * tile_w))
    return tile_t, tile_h, BLOCK // (tile_t * tile_h)


@triton.jit
def load_span(p_cu_spans, p_grid, p_step, s, num_spans, num_tokens):
    """First token, grid (t, h, w) and whether windows apply (not in text), of a span or a block of spans.

    The slack counts as span num_spans, of grid (1, 1, its length).
    """
    real = s < num_spans
    begin = tl.load(p_cu_spans + tl.minimum(s, num_spans))
    t = tl.load(p_grid + 3 * s, mask=real, other=1)
    h = tl.load(p_grid + 3 * s + 1, mask=real, other=1)
    w = tl.load(p_grid + 3 * s + 2, mask=real, other=0)
    w = tl.where(real, w, tl.maximum(num_tokens - begin, 0))
    step_t = tl.load(p_step + 3 * s, mask=real, other=0.0)
    step_h = tl.load(p_step + 3 * s + 1, mask=real, other=0.0)
    step_w = tl.load(p_step + 3 * s + 2, mask=real, other=0.0)
    return begin, t, h, w, (step_t != 0) | (step_h != 0) | (step_w != 0)


@triton.jit
def span_work(layout, s, window, num_spans, num_samples, num_tokens, search_steps, BLOCK: tl.constexpr):
    """Of a block of spans: tiles, about how many keys a tile walks, tile sizes along t and h, the sample's boundaries."""
    p_cu_seqlens, p_cu_spans, p_grid, p_step = layout
    begin, t, h, w, windowed = load_span(p_cu_spans, p_grid, p_step, s, num_spans, num_tokens)
    tile_t, tile_h, tile_w = tile_shape(t, h, w, BLOCK)
    tiles = tl.cdiv(t, tile_t) * tl.cdiv(h, tile_h) * tl.cdiv(w, tile_w)
    sample = find_row(p_cu_seqlens, num_samples, begin, search_steps)
    real = (s < num_spans) & (sample < num_samples)
    sample_begin = tl.load(p_cu_seqlens + sample, mask=real, other=0)
    sample_end = tl.load(p_cu_seqlens + sample + 1, mask=real, other=0)
    union = tl.minimum(tl.where(windowed & (window[0] > 0), window[0] + tile_t - 1, t), t)
    union *= tl.minimum(tl.where(windowed & (window[1] > 0), window[1] + tile_h - 1, h), h)
    union *= tl.minimum(tl.where(windowed & (window[2] > 0), window[2] + tile_w - 1, w), w)
    keys = tl.where(s < num_spans, sample_end - sample_begin - t * h * w + union, -1)
    return tiles, keys, tile_t, tile_h, sample_begin, sample_end


@triton.jit(do_not_specialize=["num_spans", "num_samples", "num_tokens", "search_steps"])
def tile_list_kernel(
    layout, p_list, window, num_spans, num_samples, num_tokens, search_steps, BLOCK: tl.constexpr, SPANS: tl.constexpr
):  # fmt: skip
    """As work_list_kernel, of spans: program s writes span s's tiles, num_spans the slack's, which come last.

    list[5 s] is what span s's tiles have in common: first entry, tile sizes along t and h, the sample's boundaries. Behind these
    come the number of entries and, for each, its span.
    """
    s = tl.program_id(0)
    count, cost, tile_t, tile_h, sample_begin, sample_end = span_work(
        layout, s, window, num_spans, num_samples, num_tokens, search_steps, BLOCK
    )
    start = count * 0
    for first in range(0, num_spans, SPANS):
        c = first + tl.arange(0, SPANS)
        work = span_work(layout, tl.minimum(c, num_spans), window, num_spans, num_samples, num_tokens, search_steps, BLOCK)
        before = (work[1] > cost) | ((work[1] == cost) & (c < s))
        start += tl.sum(tl.where(before & (c < num_spans), work[0], 0), axis=0)
    p_span = p_list + 5 * s
    tl.store(p_span, start)
    tl.store(p_span + 1, tile_t)
    tl.store(p_span + 2, tile_h)
    tl.store(p_span + 3, sample_begin)
    tl.store(p_span + 4, sample_end)
    p_entries = p_list + 5 * (num_spans + 1) + 1
    if s == num_spans:
        tl.store(p_entries - 1, start + count)
    for first in range(0, count, SPANS):
        i = first + tl.arange(0, SPANS)
        tl.store(p_entries + start + i, s + i * 0, mask=i < count)


def tile_list(
    layout: tuple[Tensor, ...], window: tuple[int, ...], num_spans: int, num_samples: int, num_tokens: int, block: int
) -> tuple[Tensor, int]:
    """(list, the most tiles that it may hold)."""
    # A tile's sides are less than twice the span's, so along each axis at least half of the tokens of the tiles are real.
    capacity = num_slots(8 * num_tokens, num_spans, block)
    entries = layout[0].new_empty(5 * (num_spans + 1) + 1 + capacity)
    tile_list_kernel[(num_spans + 1,)](
        layout, entries, window, num_spans, num_samples, num_tokens, num_samples.bit_length(), BLOCK=block, SPANS=128, **OPTIONS
    )  # fmt: skip
    return entries, capacity
