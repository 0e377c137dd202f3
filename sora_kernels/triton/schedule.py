"""Which program of attention serves which rows of a packed batch: a list on the device, so that the host reads no boundary.

An entry stands for a block of rows of a real sample, or within windows for a tile of a span, those that cost most first, so that
the last programs to finish are short ones. Blocks count from a sample's first row, so a sample's result does not depend on what it
is packed with.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .common import OPTIONS, Axes, find_row, num_slots, row_range


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


@triton.jit
def block_slot(p_list, sample, begin, length, first, BLOCK: tl.constexpr):
    """Where what belongs to the block of BLOCK rows from `first` on is kept, of num_slots places: see find_slot."""
    if p_list is None:
        begin = sample * length
    return begin // BLOCK + sample + first // BLOCK


def work_list(cu: Tensor, other: Tensor, num_tokens: int, num_other: int, block: int) -> tuple[Tensor, int]:
    """(list, its number of entries)."""
    samples = cu.shape[0] - 1
    capacity = num_slots(num_tokens, samples, block)
    entries = cu.new_empty(samples + 1 + capacity)
    work_list_kernel[(samples + 2,)](
        cu, other, entries, samples, num_tokens, num_other, capacity, BLOCK=block, SAMPLES=256, **OPTIONS
    )  # fmt: skip
    return entries, capacity


class Layout(NamedTuple):
    """Which tokens belong together: the tensors of a PackedLayout."""

    cu_seqlens: Any
    cu_spans: Any
    grid: Any
    step: Any


class Span(NamedTuple):
    """A span, or a block of spans: first token, sizes of the grid, and whether windows apply (not in text)."""

    begin: Any
    t: Any
    h: Any
    w: Any
    windowed: Any


class SpanTiles(NamedTuple):
    """What the tiles of a span have in common, as the tile list holds it."""

    first_entry: Any
    tile_t: Any
    tile_h: Any
    sample_begin: Any
    sample_end: Any


SPAN_TILES: tl.constexpr = tl.constexpr(len(SpanTiles._fields))


class SpanWork(NamedTuple):
    """Of a block of spans: how many tiles, about how many keys each of them attends to, their sizes, the samples' boundaries."""

    num_tiles: Any
    num_keys: Any
    tile_t: Any
    tile_h: Any
    sample_begin: Any
    sample_end: Any


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
    return Axes(tile_t, tile_h, BLOCK // (tile_t * tile_h))


@triton.jit
def load_span(layout, s, num_spans, num_tokens):
    """Span s, or a block of spans. The slack counts as span num_spans, of grid (1, 1, its length)."""
    real = s < num_spans
    begin = tl.load(layout.cu_spans + tl.minimum(s, num_spans))
    t = tl.load(layout.grid + 3 * s, mask=real, other=1)
    h = tl.load(layout.grid + 3 * s + 1, mask=real, other=1)
    w = tl.load(layout.grid + 3 * s + 2, mask=real, other=0)
    w = tl.where(real, w, tl.maximum(num_tokens - begin, 0))
    step_t = tl.load(layout.step + 3 * s, mask=real, other=0.0)
    step_h = tl.load(layout.step + 3 * s + 1, mask=real, other=0.0)
    step_w = tl.load(layout.step + 3 * s + 2, mask=real, other=0.0)
    return Span(begin, t, h, w, (step_t != 0) | (step_h != 0) | (step_w != 0))


@triton.jit
def span_work(layout, s, window, num_spans, num_samples, num_tokens, search_steps, BLOCK: tl.constexpr):
    span = load_span(layout, s, num_spans, num_tokens)
    tile = tile_shape(span.t, span.h, span.w, BLOCK)
    num_tiles = tl.cdiv(span.t, tile.t) * tl.cdiv(span.h, tile.h) * tl.cdiv(span.w, tile.w)
    sample = find_row(layout.cu_seqlens, num_samples, span.begin, search_steps)
    real = (s < num_spans) & (sample < num_samples)
    sample_begin = tl.load(layout.cu_seqlens + sample, mask=real, other=0)
    sample_end = tl.load(layout.cu_seqlens + sample + 1, mask=real, other=0)
    union = tl.minimum(tl.where(span.windowed & (window.t > 0), window.t + tile.t - 1, span.t), span.t)
    union *= tl.minimum(tl.where(span.windowed & (window.h > 0), window.h + tile.h - 1, span.h), span.h)
    union *= tl.minimum(tl.where(span.windowed & (window.w > 0), window.w + tile.w - 1, span.w), span.w)
    num_keys = tl.where(s < num_spans, sample_end - sample_begin - span.t * span.h * span.w + union, -1)
    return SpanWork(num_tiles, num_keys, tile.t, tile.h, sample_begin, sample_end)


# The tile list: SPAN_TILES integers for each span and the slack, the number of entries, and for each entry its span.


@triton.jit
def num_entries(p_list, num_spans):
    return tl.load(p_list + SPAN_TILES * (num_spans + 1))


@triton.jit
def entries_of(p_list, num_spans):
    """The pointer to the entries' spans."""
    return p_list + SPAN_TILES * (num_spans + 1) + 1


@triton.jit
def load_span_tiles(p_list, s):
    p = p_list + SPAN_TILES * s
    return SpanTiles(tl.load(p), tl.load(p + 1), tl.load(p + 2), tl.load(p + 3), tl.load(p + 4))


@triton.jit
def store_span_tiles(p_list, s, tiles):
    p = p_list + SPAN_TILES * s
    tl.store(p, tiles.first_entry)
    tl.store(p + 1, tiles.tile_t)
    tl.store(p + 2, tiles.tile_h)
    tl.store(p + 3, tiles.sample_begin)
    tl.store(p + 4, tiles.sample_end)


@triton.jit(do_not_specialize=["num_spans", "num_samples", "num_tokens", "search_steps"])
def tile_list_kernel(
    layout, p_list, window, num_spans, num_samples, num_tokens, search_steps, BLOCK: tl.constexpr, SPANS: tl.constexpr
):  # fmt: skip
    """As work_list_kernel, of spans: program s writes span s's tiles, num_spans the slack's, which come last."""
    layout, window = Layout(*layout), Axes(*window)
    s = tl.program_id(0)
    work = span_work(layout, s, window, num_spans, num_samples, num_tokens, search_steps, BLOCK)
    start = work.num_tiles * 0
    for first in range(0, num_spans, SPANS):
        c = first + tl.arange(0, SPANS)
        other = span_work(layout, tl.minimum(c, num_spans), window, num_spans, num_samples, num_tokens, search_steps, BLOCK)
        before = (other.num_keys > work.num_keys) | ((other.num_keys == work.num_keys) & (c < s))
        start += tl.sum(tl.where(before & (c < num_spans), other.num_tiles, 0), axis=0)
    store_span_tiles(p_list, s, SpanTiles(start, work.tile_t, work.tile_h, work.sample_begin, work.sample_end))
    p_entries = entries_of(p_list, num_spans)
    if s == num_spans:
        tl.store(p_entries - 1, start + work.num_tiles)
    for first in range(0, work.num_tiles, SPANS):
        i = first + tl.arange(0, SPANS)
        tl.store(p_entries + start + i, s + i * 0, mask=i < work.num_tiles)


def tile_list(layout: Layout, window: Axes, num_spans: int, num_tokens: int, block: int) -> tuple[Tensor, int]:
    """(list, the most tiles that it may hold)."""
    num_samples = layout.cu_seqlens.shape[0] - 1
    # A tile's sides are less than twice the span's, so along each axis at least half of the tokens of the tiles are real.
    capacity = num_slots(8 * num_tokens, num_spans, block)
    entries = layout.cu_seqlens.new_empty(len(SpanTiles._fields) * (num_spans + 1) + 1 + capacity)
    tile_list_kernel[(num_spans + 1,)](
        layout=tuple(layout), p_list=entries, window=tuple(window), num_spans=num_spans, num_samples=num_samples,
        num_tokens=num_tokens, search_steps=num_samples.bit_length(), BLOCK=block, SPANS=128, **OPTIONS,
    )  # fmt: skip
    return entries, capacity
