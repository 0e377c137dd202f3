"""What batches are drawn from: lengths, spans, windows, masks, dtypes, as hypothesis strategies; numbers, NaNs and views of them.

Lengths are small or lie next to a multiple of a block size of the kernels, which sweep.py reads from the code. Few are 0, and
as rarely a sample has no spans or a grid an axis of 0: on empty batches every property holds. What is drawn first shrinks to
one short sample in float32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from sweep import BLOCKS, HEAD_DIMS, MAGNITUDES
from tolerance import DTYPES, EMULATED
from torch import Tensor

from sora_kernels import backends
from sora_kernels.layout import Span


class Setting(NamedTuple):
    """Where cases run, and what a property asks of them.

    packed: no dense batches, which can hold neither samples without tokens nor rows of no sample.
    fewest: samples of a batch; most of them have tokens.
    ruled: no layer norm of one channel, whose gradient is 0 of terms that cancel, so that the rule allows no rounding of them.
    gentle: numbers near 1 in float64, of which central differences can be taken.
    """

    backend: str
    longest: int = 140  # tokens of a sample
    packed: bool = False
    fewest: int = 1
    ruled: bool = False
    gentle: bool = False

    @classmethod
    def of(cls, backend: str) -> Setting:
        return cls(backend, 40 if backend in EMULATED else 140)

    def dtypes(self, function: str) -> SearchStrategy[torch.dtype]:
        """Those in which the backend has a function of this name."""
        if self.gentle:
            return st.just(torch.float64)
        able = dtypes_of(function, self.backend)
        return st.sampled_from(able)

    def counts(self, most: int = 3) -> SearchStrategy[int]:
        """Of samples."""
        return st.integers(self.fewest, most)

    def batches(self, sample: SearchStrategy, most: int = 3) -> SearchStrategy[list]:
        return st.lists(sample, min_size=self.fewest, max_size=most)


def dtypes_of(function: str, backend: str) -> list[torch.dtype]:
    """Interpreted Triton leaves float16 out, as in all tests."""
    able = [dtype for dtype in DTYPES if backends.BACKENDS[backend].unavailable(function, "cpu", dtype) is None]
    return [dtype for dtype in able if (backend, dtype) != ("triton", torch.float16)]


class Numbers(NamedTuple):
    """Makes the tensors of one case from a seed that was drawn: they are not drawn one by one, and do not shrink."""

    dtype: torch.dtype
    generator: torch.Generator

    def randn(self, *shape: int, scale: float = 1.0, wide: bool = False) -> Tensor:
        """wide: float32 beside a dtype of 2 bytes, with digits that only float32 has."""
        numbers = scale * torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return numbers.to(torch.float32 if wide and self.dtype.itemsize == 2 else self.dtype)

    def whole(self, *shape: int) -> Tensor:
        return torch.randint(-3, 4, shape, generator=self.generator).to(self.dtype)

    def whole_in_one_channel(self, *shape: int) -> Tensor:
        """The others are 0, so that products with cotangents are exact, too."""
        channel = torch.randint(shape[-1], (*shape[:-1], 1), generator=self.generator)
        return self.whole(*shape).masked_fill(torch.arange(shape[-1]) != channel, 0)

    def chance(self, share: float, *shape: int) -> Tensor:
        """bool."""
        return torch.rand(shape, generator=self.generator) < share


@st.composite
def numbers(draw: st.DrawFn, dtype: torch.dtype) -> Numbers:
    return Numbers(dtype, torch.Generator().manual_seed(draw(st.integers(0, 2**31))))


def seldom(rare: SearchStrategy, usual: SearchStrategy) -> SearchStrategy:
    """About one draw in thirty is the rare one: at no end of a range, as hypothesis likes those."""
    return st.integers(0, 31).flatmap(lambda n: rare if n == 19 else usual)


def lengths(longest: int, fewest: int = 0) -> SearchStrategy[int]:
    """Of a sample or an axis: any small number, or one next to a multiple of a block size; 0 is rare, unless there is no other."""
    if longest == 0:
        return st.just(0)
    small = st.integers(1, min(longest, 20))
    near = sorted({min(max(m * b + e, 0), longest) for b in BLOCKS if b <= longest for m in (1, 2, 3) for e in (-1, 0, 1)})
    usual = small | st.sampled_from([n for n in near if n > 20] or [longest])
    return usual if fewest else seldom(st.just(0), usual)


widths = st.integers(1, 80) | st.sampled_from([96, 128, 130, 256, 333])
head_dims = st.sampled_from(sorted(HEAD_DIMS))
even_head_dims = st.integers(1, 20).map(lambda n: 2 * n) | st.sampled_from([64, 72, 80, 128, 130])
heads = st.sampled_from([(1, 1), (2, 2), (2, 1), (3, 1), (4, 2)])
epsilons = st.sampled_from([1e-6, 1e-5, 0.1])
scales = st.sampled_from([1.0, 1e-3, 100.0])
positions = st.sampled_from([0.0, 1.0, -2.0, 0.5, 3.25, 1e3, -1e3])
steps = st.sampled_from([1.0, 0.5, 0.1, 2.0, 0.0])


@st.composite
def grids(draw: st.DrawFn, longest: int) -> tuple[int, int, int]:
    """(T, H, W) of at most `longest` tokens, seldom of none."""
    sides, room = [1, 1, 1], longest
    for axis in draw(st.permutations(range(3))):
        sides[axis] = draw(st.integers(1, min(room, 9)) | lengths(room, fewest=1)) if room else 0
        room //= max(sides[axis], 1)
    for axis in draw(seldom(st.lists(st.integers(0, 2), min_size=1, max_size=2), st.just([]))):
        sides[axis] = 0
    return tuple(sides)  # type: ignore[return-value]


@st.composite
def spans(draw: st.DrawFn, longest: int) -> Span:
    if draw(st.integers(0, 2)) == 2:
        return Span.text(draw(lengths(longest // 2)))
    grid = draw(grids(longest))
    if draw(st.booleans()):
        return Span(grid)
    origin, step = (tuple(draw(choice) for _ in range(3)) for choice in (positions, steps))
    return Span(grid, origin, step)  # type: ignore[arg-type]


def samples(longest: int, most_spans: int = 3) -> SearchStrategy[tuple[Span, ...]]:
    """The spans of one sample; it seldom has none."""
    some = st.lists(spans(max(longest // most_spans, 1)), min_size=1, max_size=most_spans).map(tuple)
    return seldom(st.just(()), some)


empty_spans = st.sampled_from([Span((0, 4, 4)), Span.text(0), Span((3, 0, 2)), Span((2, 2, 0), (1.0, 0.0, 0.0), (0.5, 1.0, 1.0))])


@st.composite
def with_empty_spans(draw: st.DrawFn, sample: tuple[Span, ...]) -> tuple[Span, ...]:
    """The same sample with spans that hold no tokens between its own."""
    found = list(sample)
    for span in draw(st.lists(empty_spans, min_size=1, max_size=3)):
        found.insert(draw(st.integers(0, len(found))), span)
    return tuple(found)


def size(sample: tuple[Span, ...]) -> int:
    """Tokens."""
    return sum(span.num_tokens for span in sample)


axis_windows = st.none() | st.integers(1, 6) | st.integers(1, 60) | st.just(2**40)
windows = st.tuples(axis_windows, axis_windows, axis_windows)
causal_axes = st.tuples(st.booleans(), st.booleans(), st.booleans())


def sliding(longest: int) -> SearchStrategy[tuple[int, int]]:
    """FlashAttention's (left, right)."""
    sides = st.just(-1) | lengths(longest) | st.just(2**62)
    return st.just((-1, -1)) | st.tuples(sides, sides)


class Mask(NamedTuple):
    """What is added to scores: which of them get it, how large it is, and of which a part is -inf."""

    kind: str  # "keys", "rows", "all", "each", "some", "causal", "bool", "logits" or "none"
    magnitude: float
    cut: bool

    @property
    def is_large(self) -> bool:
        """Scores of float32 keep few or no digits beside it, so exact ones are rounded as float32 rounds them."""
        return abs(self.magnitude) > 100.0 or self.kind == "logits"

    def make(self, numbers: Numbers, *shape: int) -> Tensor | None:
        """float32 or bool of this shape [H, S, Sk]."""
        if self.kind in ("none", "logits", "causal"):
            return None
        if self.kind == "bool":
            return numbers.chance(0.6, *shape)
        _, n, m = shape
        mask = torch.zeros(shape)
        where = {"keys": (1, 1, m), "rows": (1, n, 1), "some": shape}.get(self.kind)
        if where is not None:
            mask = torch.where(numbers.chance(0.5, *where).expand(shape), self.magnitude, mask)
        elif self.kind == "all":
            mask = mask + self.magnitude
        else:
            mask = torch.rand(shape, generator=numbers.generator) * self.magnitude
        return mask.masked_fill(numbers.chance(0.2, *shape), -torch.inf) if self.cut else mask


@st.composite
def masks(draw: st.DrawFn, gentle: bool = False) -> Mask:
    kind = draw(
        st.sampled_from(["none", "causal", "bool", "keys", "rows", "all", "each", "some", *(() if gentle else ("logits",))])
    )
    sizes = [0.0, 1.0, 1e-3, 100.0] if gentle else [0.0, 1e10, *(abs(m) for m in MAGNITUDES)]
    magnitude = draw(st.sampled_from(sizes)) if kind not in ("none", "causal", "bool", "logits") else 0.0
    sign = 1.0 if magnitude <= 1e10 and draw(st.integers(0, 3)) == 3 else -1.0
    return Mask(kind, sign * magnitude, draw(st.booleans()))


def some(names: tuple[str, ...]) -> SearchStrategy[tuple[str, ...]]:
    """Any of these, in their order."""
    return st.lists(st.booleans(), min_size=len(names), max_size=len(names)).map(
        lambda taken: tuple(name for name, take in zip(names, taken, strict=True) if take)
    )


def tokens(grid: tuple[int, int, int]) -> int:
    return math.prod(grid)


def nans_of(bits: str, x: Tensor) -> Tensor:
    size = x.dtype.itemsize
    infinity = torch.tensor(torch.inf, dtype=x.dtype).view(torch_int(size)).item()
    word = {"ones": -1, "positive": 2 ** (8 * size - 1) - 1, "signalling": infinity + 1}[bits]
    return torch.full(x.shape, word, dtype=torch_int(size)).view(x.dtype)


def torch_int(size: int) -> torch.dtype:
    return {2: torch.int16, 4: torch.int32, 8: torch.int64}[size]


def rows(x: Tensor) -> Tensor:
    """Columns of a wider buffer of NaNs."""
    return torch.cat([torch.full_like(x, torch.nan), x], dim=-1)[..., x.shape[-1] :]


def columns(x: Tensor) -> Tensor:
    """Every other number of a last axis."""
    return torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]


def offset(x: Tensor) -> Tensor:
    """Not at the beginning of a vector."""
    return torch.cat([x.new_full((1,), torch.nan), x.flatten()])[1:].view(x.shape)


def turned(x: Tensor) -> Tensor:
    """The first axis is the innermost one."""
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


def every_other(x: Tensor) -> Tensor:
    """Every other row."""
    return torch.stack([x, torch.full_like(x, torch.nan)], dim=1)[:, 0]


VIEWS = (rows, columns, offset, turned, every_other)
