"""Who attends to whom in windows: a tile of tokens, the tokens on the other side, and which of these belong together.

A tile is a box of BLOCK positions of a span's grid. The union of its windows is a box as well, and so is that of the queries that
attend to a tile of keys.

A token and one of the other side belong together if, along all three axes, the token's place in the tile is within an interval that
the other's position gives. The three places are fields of one integer, and so are the three begins and the three ends. So a pair
takes two subtractions, whatever its axes. The interval of a token takes more instructions than that, so `once` keeps the compiler
from computing it again in every thread.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton import knobs

from .common import Axes
from .schedule import entries_of, load_span, load_span_tiles


class Interval(NamedTuple):
    """begin .. end, or blocks of both."""

    begin: Any
    end: Any


class Divisor(NamedTuple):
    """A number n >= 1, and what `divide` needs of it."""

    n: Any
    reciprocal: Any


class Box(NamedTuple):
    """A box of a span's grid: its first token, and how many tokens a frame and a row of it have."""

    first: Any
    frame: Divisor
    row: Divisor


class Range(NamedTuple):
    """The tokens on the other side of a tile's scores: first those of the sample's other spans, then a box of the tile's own span.

    `before` of the others come before the span, which has span_size tokens in frames of h x w.
    """

    num_tokens: Any
    num_others: Any
    before: Any
    span_size: Any
    sample_begin: Any
    h: Any
    w: Any
    box: Box


class Other(NamedTuple):
    """Tokens [BLOCK] on the other side, num_tokens where there is none, and which places of the tile go with them, packed."""

    token: Any
    begin: Any
    end: Any


class Along(NamedTuple):
    """What says, along an axis, which places of the tile go with a position of the box: see `places`."""

    begin: Any
    begin_limit: Any
    end: Any
    end_limit: Any


class Tile(NamedTuple):
    """What a program owns, one tile of a head: its tokens [BLOCK], num_tokens past the tile's end, and their places in it, packed;
    all tokens that at least one of them attends to, or that attend to it; and what says which of these belong together.
    """

    head: Any
    token: Any
    place: Any
    others: Range
    along: Axes  # of Along


@triton.jit
def axis_window(i, length, size, causal, OF_KEYS: tl.constexpr):
    """The keys of an axis that query i attends to; with OF_KEYS, the queries that attend to key i. Size 0 is the whole axis."""
    size = tl.where(size == 0, length, tl.minimum(size, length))
    if OF_KEYS:
        begin = tl.where(i < size, 0, i - size + 1 + size // 2)
        end = tl.where(i >= length - size, length, i + size // 2 + 1)
        return Interval(tl.where(causal, i, begin), tl.where(causal, tl.minimum(i + size, length), end))
    else:
        begin = tl.maximum(tl.minimum(i - size // 2, length - size), 0)
        return Interval(tl.where(causal, tl.maximum(i - size + 1, 0), begin), tl.where(causal, i + 1, begin + size))


@triton.jit
def tile_window(first, end, length, size, causal, OF_KEYS: tl.constexpr):
    """The union of the windows of first .. end along an axis: (begin, how many)."""
    begin = axis_window(first, length, size, causal, OF_KEYS).begin
    return begin, axis_window(tl.minimum(end, length) - 1, length, size, causal, OF_KEYS).end - begin


@triton.jit
def divisor(n):
    return Divisor(n, tl.full([], 0xFFFFFFFF, tl.uint32) // n.to(tl.uint32))


@triton.jit
def divide(x, by):
    """(x // n, x % n) for 0 <= x < 2**31: the product with the reciprocal is at most one too small."""
    quotient = tl.umulhi(x.to(tl.uint32), by.reciprocal).to(tl.int32)
    rest = x - quotient * by.n
    more = rest >= by.n
    return tl.where(more, quotient + 1, quotient), tl.where(more, rest - by.n, rest)


@triton.jit
def locate_tile(
    layout, p_list, program, window, causal, num_spans, num_tokens, num_heads, BLOCK: tl.constexpr, OF_KEYS: tl.constexpr
):
    """The tile of program number `program`, of all tiles and heads: of queries, or OF_KEYS."""
    s = tl.load(entries_of(p_list, num_spans) + program // num_heads)
    span = load_span(layout, s, num_spans, num_tokens)
    tiles = load_span_tiles(p_list, s)
    tile_w = BLOCK // (tiles.tile_t * tiles.tile_h)
    tiles_h = tl.cdiv(span.h, tiles.tile_h)
    tiles_w = tl.cdiv(span.w, tile_w)
    num_tiles = tl.cdiv(span.t, tiles.tile_t) * tiles_h * tiles_w
    local = program - tiles.first_entry * num_heads
    tile = local % num_tiles
    t0 = tile // (tiles_h * tiles_w) * tiles.tile_t
    h0 = tile // tiles_w % tiles_h * tiles.tile_h
    w0 = tile % tiles_w * tile_w

    lane = tl.arange(0, BLOCK)
    i_t = t0 + lane // (tiles.tile_h * tile_w)
    i_h = h0 + lane // tile_w % tiles.tile_h
    i_w = w0 + lane % tile_w
    inside = (i_t < span.t) & (i_h < span.h) & (i_w < span.w)
    token = tl.where(inside, span.begin + (i_t * span.h + i_h) * span.w + i_w, num_tokens)

    size_t = tl.where(span.windowed, window.t, 0)
    size_h = tl.where(span.windowed, window.h, 0)
    size_w = tl.where(span.windowed, window.w, 0)
    causal_t = span.windowed & causal.t
    causal_h = span.windowed & causal.h
    causal_w = span.windowed & causal.w
    box_t, num_t = tile_window(t0, t0 + tiles.tile_t, span.t, size_t, causal_t, OF_KEYS)
    box_h, num_h = tile_window(h0, h0 + tiles.tile_h, span.h, size_h, causal_h, OF_KEYS)
    box_w, num_w = tile_window(w0, w0 + tile_w, span.w, size_w, causal_w, OF_KEYS)

    # The slack attends to nothing: its sample's boundaries are 0.
    size = span.t * span.h * span.w
    num_hw = tl.maximum(num_h * num_w, 1)
    num_others = tiles.sample_end - tiles.sample_begin - tl.where(s < num_spans, size, 0)
    box_size = tl.where(s < num_spans, num_t * num_hw, 0)
    box_first = span.begin + (box_t * span.h + box_h) * span.w + box_w
    box = Box(box_first, divisor(num_hw), divisor(tl.maximum(num_w, 1)))
    others = Range(
        num_tokens=num_others + box_size,
        num_others=num_others,
        before=span.begin - tiles.sample_begin,
        span_size=size,
        sample_begin=tiles.sample_begin,
        h=span.h,
        w=span.w,
        box=box,
    )
    along = Axes(
        of_axis(t0, box_t, span.t, size_t, causal_t, BLOCK, OF_KEYS),
        of_axis(h0, box_h, span.h, size_h, causal_h, BLOCK, OF_KEYS),
        of_axis(w0, box_w, span.w, size_w, causal_w, BLOCK, OF_KEYS),
    )
    return Tile(local // num_tiles, token, packed(i_t - t0, i_h - h0, i_w - w0), others, along)


@triton.jit
def of_axis(first, box, length, size, causal, BLOCK: tl.constexpr, OF_KEYS: tl.constexpr):
    """Along of a tile from `first` on and a box from `box` on: axis_window, from the other side's view."""
    size = tl.where(size == 0, length, tl.minimum(size, length))
    half = size // 2
    first_in_box = first - box
    if OF_KEYS:
        return Along(
            first_in_box + tl.where(causal, size - 1, half),
            tl.where(causal, BLOCK, tl.minimum(tl.maximum(length - size - first, 0), BLOCK)),
            first_in_box + tl.where(causal, -1, half - size),
            tl.where(causal, 0, tl.minimum(tl.maximum(size - first, 0), BLOCK)),
        )
    else:
        return Along(
            first_in_box + tl.where(causal, 0, size - 1 - half),
            tl.where(causal, 0, size - box),
            first_in_box - tl.where(causal, size, half + 1),
            length - size - box,
        )


@triton.jit
def places(i, along, BLOCK: tl.constexpr, OF_KEYS: tl.constexpr):
    """The interval of places of a tile's axis that go with position i of the box, within 0 .. BLOCK."""
    begin, end = i - along.begin, i - along.end
    if OF_KEYS:
        return Interval(tl.minimum(tl.maximum(begin, 0), along.begin_limit), tl.minimum(tl.maximum(end, along.end_limit), BLOCK))
    else:
        begin, end = tl.minimum(tl.maximum(begin, 0), BLOCK), tl.minimum(tl.maximum(end, 0), BLOCK)
        return Interval(tl.where(i < along.begin_limit, 0, begin), tl.where(i >= along.end_limit, BLOCK, end))


# Three numbers of 0 to 256 in one, with a bit above each: a - b + ABOVE has that bit where a field of a is not less than b's.
FIELD: tl.constexpr = tl.constexpr(10)
ABOVE: tl.constexpr = tl.constexpr(0x20080200)
ONES: tl.constexpr = tl.constexpr(0x00100401)


@triton.jit
def packed(t, h, w):
    return t | h << FIELD | w << 2 * FIELD


@triton.jit
def once(x):
    """x, which the compiler computes once and hands around, instead of again in each thread that needs an element."""
    return tl.sum(x[:, None], axis=1)


@triton.jit
def other_tokens(tile, first, num_tokens, BLOCK: tl.constexpr, OF_KEYS: tl.constexpr):
    """Tokens first .. first + BLOCK of tile.others. OF_KEYS: whether the tile is one of keys."""
    OWNERS: tl.constexpr = tile.place.shape[0]
    tl.static_assert(OWNERS <= 256)
    others = tile.others
    index = first + tl.arange(0, BLOCK)
    is_other = index < others.num_others
    i_t, in_frame = divide(tl.maximum(index - others.num_others, 0), others.box.frame)
    i_h, i_w = divide(in_frame, others.box.row)
    token = tl.where(
        is_other,
        others.sample_begin + index + tl.where(index < others.before, 0, others.span_size),
        others.box.first + (i_t * others.h + i_h) * others.w + i_w,
    )
    inside = index < others.num_tokens
    t = places(i_t, tile.along.t, OWNERS, OF_KEYS)
    h = places(i_h, tile.along.h, OWNERS, OF_KEYS)
    w = places(i_w, tile.along.w, OWNERS, OF_KEYS)
    # Of all places to tokens of other spans, and of none to what comes behind the last token.
    begin = tl.where(is_other, 0, packed(t.begin, h.begin, w.begin)) - ABOVE
    end = tl.where(inside, tl.where(is_other, OWNERS * ONES, packed(t.end, h.end, w.end)), 0) + (ABOVE - ONES)
    return Other(once(tl.where(inside, token, num_tokens)), once(begin), once(end))


@triton.jit
def pair_score(product, place, begin, end):
    """-inf unless begin <= place < end in all three fields."""
    return tl.where(((place - begin) & (end - place) & ABOVE) == ABOVE, product, float("-inf"))


INTERPRETED: tl.constexpr = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def window_scores(products, tile, other, scale, PLAIN: tl.constexpr):
    """Scores [owners, BLOCK] of products with a tile; a positive scale alone (PLAIN) is left to `exponent_factor`."""
    place, begin, end = tile.place[:, None], other.begin[None, :], other.end[None, :]
    products = products if PLAIN else products * scale
    # Element by element: as an expression of tensors Triton would compare elsewhere and move the mask through shared memory, which
    # takes as many instructions again, and fails on gfx942. The interpreter has no map_elementwise.
    if INTERPRETED:
        return pair_score(products, place, begin, end)
    else:
        return tl.map_elementwise(pair_score, products, place, begin, end)
