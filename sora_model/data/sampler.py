"""Batches of mixed sizes that fill a token budget, with no padding: `PackedSampler`, and `WorldSource` to feed it.

A source has `size(index) -> (T, H, W)`, cheap and without decoding, and `load(index, epoch) -> Sample`. A batch is
chosen from a buffer of `lookahead` samples: the oldest ones with which some subset of the buffer fills 95% of the budget, or
where none does, as much of it as can be (an exact subset sum).

A source with a length is gone through epoch by epoch, each in its own random order; what a batch does not take stays in the
buffer, so every sample is used once per epoch, whatever its size. A source without a length is endless: each batch has a
buffer of its own, and what it does not take is never drawn.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import NamedTuple, Protocol

import numpy as np
import torch

from sora_model.data.lessons import closeup, drift, link, morph, turn
from sora_model.data.media import MediaError
from sora_model.data.world import World

logger = logging.getLogger(__name__)

Size = tuple[int, int, int]
GOLDEN, SILVER = 0x9E3779B97F4A7C15, 0x6A09E667F3BCC909  # the fractions of (1 + sqrt 5) / 2 and of sqrt 2, in 2^-64
LESSONS = {"drift": drift, "turn": turn, "link": link, "morph": morph, "closeup": closeup}


class Sample(NamedTuple):
    """A clip [3, T, H, W] in [-1, 1] and its caption.

    detailed: a long caption too, if there is one. given: where the clip teaches a task, bool [T], the frames that are given.
    """

    video: torch.Tensor
    caption: str
    detailed: str | None = None
    given: torch.Tensor | None = None


class Source(Protocol):
    """What the sampler draws from: `FolderSource`, which also has a length, or `WorldSource`, which has none.

    It may have `name(index)`, by which messages call a sample.
    """

    def size(self, index: int) -> Size: ...

    def load(self, index: int, epoch: int = 0) -> Sample: ...


@dataclass
class Batch:
    """One step's samples, of mixed sizes, their indices into the source, and how many tokens they are in all."""

    samples: list[Sample]
    indices: list[int]
    tokens: int

    @property
    def videos(self) -> list[torch.Tensor]:
        return [sample.video for sample in self.samples]

    @property
    def captions(self) -> list[str]:
        return [sample.caption for sample in self.samples]


class Item(NamedTuple):
    """A sample that waits to be used."""

    number: int
    epoch: int
    size: Size
    tokens: int
    cost: int


class Unfit(ValueError):
    """A sample that no batch can hold: larger than the budget, or not of whole patches."""


class WorldSource:
    """Endless scenes of a world, drawn at mixed sizes.

        source = WorldSource(World(), [(8, 32, 32), (8, 24, 40), (8, 40, 24), (1, 32, 32)], weights=[3, 2, 2, 1])
        source.load(0)     # Sample(float32 [3, 8, 32, 32] in [-1, 1], "a blue circle moves left", "A medium blue ...", None)

    sizes: (T, H, W) to draw from; T = 1 is an image, whose caption names no motion. weights: how often each is offered,
    relative (default: alike); a budget of few samples takes small ones more often than that, as they fill it up.
    lessons: shares of the clips that teach a task, by name; see `lessons.py`. timing: pixel frames of the first and of each other
    token frame, for what is given in them.
    """

    def __init__(
        self,
        world: World,
        sizes: Sequence[Size],
        *,
        weights: Sequence[float] | None = None,
        lessons: Mapping[str, float] | None = None,
        timing: tuple[int, int] = (1, 1),
    ) -> None:
        weights = [1.0] * len(sizes) if weights is None else list(weights)
        if not sizes or any(len(size) != 3 or min(size) < 1 for size in sizes):
            raise ValueError(f"WorldSource: sizes must be a list of (T, H, W), each at least 1, got {sizes}")
        if len(weights) != len(sizes) or min(weights) <= 0:
            raise ValueError(f"WorldSource: need a weight above 0 for each of {len(sizes)} sizes, got {weights}")
        lessons = dict(lessons or {})
        if not set(lessons) <= set(LESSONS) or min(lessons.values(), default=0) < 0 or sum(lessons.values()) > 1:
            raise ValueError(f"WorldSource: lessons must be shares >= 0 of {', '.join(LESSONS)}, at most 1 in all, got {lessons}")
        self._lessons, self.timing = list(zip(lessons, accumulate(lessons.values()), strict=True)), timing
        self.world, self.sizes = world, [(t, h, w) for t, h, w in sizes]
        self._bounds = [bound / sum(weights) for bound in accumulate(weights)][:-1]

    def size(self, index: int) -> Size:
        return self.sizes[bisect_right(self._bounds, _spread(index, GOLDEN))]

    def load(self, index: int, epoch: int = 0) -> Sample:
        size = self.size(index)
        scene = self.world.sample(index)
        drawn = _spread(index, SILVER)
        for name, bound in self._lessons if size[0] > self.timing[0] else ():
            if drawn < bound:
                rng = np.random.default_rng((self.world.config.seed, index, 2**32))
                return Sample(*LESSONS[name](scene, size, self.timing, self.world, rng))
        return Sample(scene.render(*size), scene.caption(frames=size[0]), scene.caption(True, size[0]))


class Repeated:
    """The first `length` samples of an endless source, again in every epoch: what is computed of them can be kept."""

    def __init__(self, source: Source, length: int) -> None:
        if length < 1:
            raise ValueError(f"Repeated: length must be at least 1, got {length}")
        self.source, self.length = source, length

    def __len__(self) -> int:
        return self.length

    def size(self, index: int) -> Size:
        return self.source.size(index)

    def load(self, index: int, epoch: int = 0) -> Sample:
        return self.source.load(index)


class PackedSampler:
    """Batches that fill `tokens_per_batch` with samples of mixed sizes; batch `step` depends on the seed and step alone.

        sampler = PackedSampler(source, patch_size=(1, 2, 2), tokens_per_batch=4096, min_sizes=4)
        sampler.batch(0)                              # Batch(samples=[...], indices=[...], tokens=4096)
        for batch in sampler.stream(start=1000):      # as if the first 1000 had been drawn; goes on without end
            ...

    attention_width: D of a transformer, to fill batches by what they cost it instead: n tokens of one sample count
    n (1 + n / 6D), as attention among them takes n / 6D of what their matrices take. Long samples then come with fewer others,
    so that steps, and processes, take alike long.
    patch_size: (pt, ph, pw) of a token. latent_size: maps a video's (T, H, W) to its latent's, where a VAE stands between.
    lookahead: samples in the buffer. min_sizes: the fewest different (T, H, W) in each batch: one sample of each is put in
    before the rest is filled. That can be promised of an endless source only: from a finite one every sample must be used,
    whatever sizes are left. rank, num_ranks: of several processes with the same seed, rank r takes batches r,
    r + num_ranks, ... so that no two train on the same sample.

    Samples of a finite source that are larger than the budget, or do not divide by the patches, are left out from the start,
    with a warning line each; `usable` has the numbers of the others. A sample that turns out to be unreadable, or to have another
    size that does not fit, is left out of its batch, with a warning line the first time; the batch is that much smaller.

    Raises ValueError where that leaves none of a finite source, where one of an endless source does not fit, or for a budget
    that cannot hold min_sizes different sizes.

    Any step of an endless source is made at once. The order of a finite one is recomputed up to the step, at some
    microseconds per sample; nothing is decoded for it.
    """

    def __init__(
        self,
        source: Source,
        patch_size: Size,
        tokens_per_batch: int,
        *,
        latent_size: Callable[[Size], Size] | None = None,
        lookahead: int = 64,
        min_sizes: int = 1,
        attention_width: int | None = None,
        seed: int = 0,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        if min(tokens_per_batch, lookahead, min_sizes, *patch_size) < 1 or len(patch_size) != 3:
            raise ValueError(
                "PackedSampler: patch_size (three numbers), tokens_per_batch, lookahead and min_sizes must be at least 1, "
                f"got {patch_size}, {tokens_per_batch}, {lookahead}, {min_sizes}"
            )
        if not 0 <= rank < num_ranks:
            raise ValueError(f"PackedSampler: need 0 <= rank < num_ranks, got {rank} and {num_ranks}")
        self._length = len(source) if isinstance(source, Sized) else None
        if self._length == 0:
            raise ValueError("PackedSampler: source has no samples")
        if self._length is not None and min_sizes > 1:
            raise ValueError(f"PackedSampler: min_sizes = {min_sizes} needs an endless source, but source has {self._length}")
        self.source, self.patch_size, self.tokens_per_batch = source, tuple(patch_size), tokens_per_batch
        self.latent_size, self.lookahead, self.min_sizes = latent_size, lookahead, min_sizes
        self.attention_width = attention_width
        self.seed, self.rank, self.num_ranks = seed, rank, num_ranks
        self._token_counts: dict[Size, int] = {}
        self._warned: set[int] = set()
        self.usable: list[int] = []
        for index in range(self._length or 0):  # a sample that cannot be batched is told of before training begins
            try:
                self._check_fits(index, source.size(index))
                self.usable.append(index)
            except Unfit as error:
                if not self.usable and index == len(source) - 1:  # type: ignore[arg-type]
                    raise ValueError(f"PackedSampler: none of the source's {index + 1} samples fits: {error}") from None
                logger.warning("left out: %s", error)
        self._usable = frozenset(self.usable)
        self._rewind()

    def batch(self, step: int) -> Batch:
        """The batch of this rank at `step`."""
        if step < 0:
            raise ValueError(f"PackedSampler.batch: step must be at least 0, got {step}")
        while not (batch := self._load(step)).samples:
            if self._length is not None and self._warned >= self._usable:
                raise ValueError("PackedSampler: none of the source's samples can be decoded")
            step += 1  # nothing of this batch could be read
        return batch

    def _load(self, step: int) -> Batch:
        """What can be read of the batch of this rank at `step`."""
        batch = Batch([], [], 0)
        for index, epoch, size, tokens, _ in self._plan(step * self.num_ranks + self.rank):
            try:
                sample = self.source.load(index, epoch)
                frames, height, width = sample.video.shape[1:]
                if (frames, height, width) != size:
                    tokens = self._check_fits(index, (frames, height, width))
            except (MediaError, Unfit) as error:
                if index not in self._warned:
                    self._warned.add(index)
                    logger.warning("left out of its batch: %s", error)
                continue
            batch.samples.append(sample)
            batch.indices.append(index)
            batch.tokens += tokens
        return batch

    def stream(self, start: int = 0, *, prefetch: int = 0) -> Iterator[Batch]:
        """Batches from step `start` on, without end; `prefetch` of them are made ahead by a thread (for decoding files)."""
        if prefetch < 1:
            step = start
            while True:
                yield self.batch(step)
                step += 1
        with ThreadPoolExecutor(max_workers=1) as pool:
            ahead: deque[Future[Batch]] = deque(pool.submit(self.batch, start + i) for i in range(prefetch))
            step = start + prefetch
            try:
                while True:
                    ahead.append(pool.submit(self.batch, step))
                    step += 1
                    yield ahead.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _rewind(self) -> None:
        self._position = 0
        self._buffer: list[Item] = []  # oldest first
        self._epoch = -1
        self._order: Iterator[int] = iter(())

    def _plan(self, position: int) -> list[Item]:
        """The samples of batch `position`, counted over all ranks."""
        if self._length is None:
            first = self.seed * 2**40 + position * 16 * self.lookahead
            fresh: list[Item] = []
            required = None
            while required is None and len(fresh) < 16 * self.lookahead:  # looks on where a rare size is needed
                fresh += [self._item(first + len(fresh) + i, 0) for i in range(self.lookahead)]
                required = self._required(fresh)
            if required is None:
                tokens = {item.size: item.cost for item in fresh}
                raise ValueError(
                    f"PackedSampler: a batch needs min_sizes = {self.min_sizes} different sizes within tokens_per_batch = "
                    f"{self.tokens_per_batch}; the source has sizes (T, H, W) of so many tokens: {tokens}"
                )
            return [fresh[i] for i in sorted(self._fill_up(fresh, required))]
        if position < self._position:
            self._rewind()
        while True:
            self._refill(self._length)
            chosen = self._fill_up(self._buffer, {0})  # the oldest: none waits for ever
            batch = [self._buffer[i] for i in sorted(chosen)]
            self._buffer = [item for i, item in enumerate(self._buffer) if i not in chosen]
            self._position += 1
            if self._position > position:
                return batch

    def _refill(self, length: int) -> None:
        while len(self._buffer) < self.lookahead:
            index = next(self._order, None)
            if index is None:
                self._epoch += 1
                rng = np.random.default_rng((self.seed, self._epoch))
                self._order = iter(rng.permutation(length).tolist())
            elif index in self._usable:
                self._buffer.append(self._item(index, self._epoch))

    def _fill_up(self, items: list[Item], chosen: set[int]) -> set[int]:
        """Places of the samples that make a batch, with those in `chosen`."""
        room = self.tokens_per_batch - sum(items[i].cost for i in chosen)
        rest = [i for i in range(len(items)) if i not in chosen]
        return chosen | {rest[i] for i in _fill(room, self.tokens_per_batch // 20, [items[i].cost for i in rest])}

    def _required(self, items: list[Item]) -> set[int] | None:
        """Places of one sample of each of `min_sizes` sizes: the oldest, or where they do not fit, the smallest."""
        oldest_of: dict[Size, int] = {}
        for i, item in enumerate(items):
            oldest_of.setdefault(item.size, i)
        by_age = list(oldest_of.values())
        by_cost = sorted(by_age, key=lambda i: items[i].cost)
        for order in (by_age, [by_age[0], *(i for i in by_cost if i != by_age[0])], by_cost):
            places = set(order[: self.min_sizes])
            if len(places) == self.min_sizes and sum(items[i].cost for i in places) <= self.tokens_per_batch:
                return places
        return None

    def _item(self, index: int, epoch: int) -> Item:
        size = self.source.size(index)
        try:
            tokens = self._check_fits(index, size)
        except Unfit as error:
            raise ValueError(f"PackedSampler: {error}") from None
        return Item(index, epoch, size, tokens, self._cost(tokens))

    def _cost(self, tokens: int) -> int:
        return tokens if self.attention_width is None else round(tokens * (1 + tokens / (6 * self.attention_width)))

    def _check_fits(self, index: int, size: Size) -> int:
        """How many tokens a sample of this size has. Raises Unfit if no batch can hold it."""
        if size not in self._token_counts:
            latent = self.latent_size(size) if self.latent_size else size
            if any(length % patch for length, patch in zip(latent, self.patch_size, strict=True)):
                what = f"{size}, as a latent {latent}," if self.latent_size else f"{size}"
                raise Unfit(f"{self._name(index)} of size {what} does not divide by patch_size {self.patch_size}")
            self._token_counts[size] = prod(latent) // prod(self.patch_size)
        tokens = self._token_counts[size]
        if (cost := self._cost(tokens)) > self.tokens_per_batch:
            cost_of_it = "" if self.attention_width is None else f" that count as {cost}"
            raise Unfit(
                f"{self._name(index)} of size (T, H, W) = {size} is {tokens} tokens{cost_of_it} at patch_size {self.patch_size}, "
                f"more than tokens_per_batch = {self.tokens_per_batch}; it takes a larger budget, or smaller or shorter samples"
            )
        return tokens

    def _name(self, index: int) -> str:
        name = getattr(self.source, "name", None)
        return f"sample {index}" if name is None else name(index)


def _spread(index: int, ratio: int) -> float:
    """A number in [0, 1) per index; those of consecutive indices lie evenly, and so does any few of them."""
    return index * ratio % 2**64 / 2**64


def _fill(room: int, slack: int, tokens: list[int]) -> list[int]:
    """Places of numbers whose sum is within `slack` of `room`, or else as near as can be; the earliest that do.

        _fill(10, 0, [6, 5, 5, 3])     # [1, 2]
        _fill(10, 1, [6, 5, 5, 3])     # [0, 3]

    Bit s of reach[i] says that some of tokens[i:] sum to s.
    """
    within, reach = (1 << (room + 1)) - 1, [1]
    for count in reversed(tokens):
        reach.append((reach[-1] | reach[-1] << count) & within)
    reach.reverse()
    low, high, places = min(reach[0].bit_length() - 1, room - slack), room, []
    for i, count in enumerate(tokens):  # low and high: how much more must and may be taken
        if count <= high and reach[i + 1] >> max(low - count, 0) & (1 << (high - max(low, count) + 1)) - 1:
            places.append(i)
            low, high = low - count, high - count
    return places
