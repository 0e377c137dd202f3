"""Batches of mixed sizes that fill a token budget, with no padding: `PackedSampler`.

A source has `size(index) -> (T, H, W)`, cheap and without decoding, and `load(index, epoch) -> Sample`. A batch is
chosen from a buffer of `lookahead` samples: the oldest ones with which some subset of the buffer fills 95% of the budget, or
where none does, as much of it as can be (an exact subset sum).

A source with a length is gone through epoch by epoch, each in its own random order; what a batch does not take stays in the
buffer, so every sample is used once per epoch, whatever its size. A source without a length is endless: each batch has a
buffer of its own, and what it does not take is never drawn.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from ..sizes import Size
from .budget import PLAIN, TokenBudget, Unfit, Wording
from .media import MediaError
from .sample import Batch, Source

logger = logging.getLogger(__name__)
LARGEST_ROOM = 2**20  # bits of a set of sums, see `_fill`


class Item(NamedTuple):
    """A sample that waits to be used."""

    number: int
    epoch: int
    size: Size
    tokens: int
    cost: int


class PackedSampler:
    """Batches that fill `tokens_per_batch` with samples of mixed sizes; batch `step` depends on the seed and step alone.

    >>> sampler = PackedSampler(source, patch_size=(1, 2, 2), tokens_per_batch=448, min_sizes=2)
    >>> sampler.batch(0).tokens
    448
    >>> batch = next(sampler.stream(start=1000))  # as if the first 1000 had been drawn; goes on without end
    >>> batch.indices == sampler.batch(1000).indices
    True

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
    that cannot hold min_sizes different sizes. wording: how these messages call the budget.

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
        wording: Wording = PLAIN,
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
        self.source, self.lookahead, self.min_sizes = source, lookahead, min_sizes
        self.budget = TokenBudget(patch_size, tokens_per_batch, latent_size, attention_width, wording)
        self.seed, self.rank, self.num_ranks = seed, rank, num_ranks
        self._token_counts: dict[Size, int] = {}
        self._warned: set[int] = set()
        self.usable: list[int] = []
        for index in range(self._length or 0):  # a sample that cannot be batched is named before training begins
            try:
                self._check_fits(index, source.size(index))
                self.usable.append(index)
            except Unfit as error:
                if not self.usable and index == len(source) - 1:  # type: ignore[arg-type]
                    raise ValueError(f"PackedSampler: none of the source's {index + 1} samples fits: {error}") from None
                logger.warning("left out: %s", error)
        self._usable = frozenset(self.usable)
        self._rewind()
        if self._length is None:
            self._plan(0)  # so that sizes that fit no batch are an error at once

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
                    f"PackedSampler: a batch needs min_sizes = {self.min_sizes} different sizes within "
                    f"{self.budget.wording.limit} {self.budget.tokens_per_batch}; sizes (T, H, W) have so many tokens: {tokens}"
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
        room = self.budget.tokens_per_batch - sum(items[i].cost for i in chosen)
        rest = [i for i in range(len(items)) if i not in chosen]
        return chosen | {rest[i] for i in _fill(room, self.budget.tokens_per_batch // 20, [items[i].cost for i in rest])}

    def _required(self, items: list[Item]) -> set[int] | None:
        """Places of one sample of each of `min_sizes` sizes: the oldest, or where they do not fit, the smallest."""
        oldest_of: dict[Size, int] = {}
        for i, item in enumerate(items):
            oldest_of.setdefault(item.size, i)
        by_age = list(oldest_of.values())
        by_cost = sorted(by_age, key=lambda i: items[i].cost)
        for order in (by_age, [by_age[0], *(i for i in by_cost if i != by_age[0])], by_cost):
            places = set(order[: self.min_sizes])
            if len(places) == self.min_sizes and sum(items[i].cost for i in places) <= self.budget.tokens_per_batch:
                return places
        return None

    def _item(self, index: int, epoch: int) -> Item:
        size = self.source.size(index)
        try:
            tokens = self._check_fits(index, size)
        except Unfit as error:
            raise ValueError(f"PackedSampler: {error}") from None
        return Item(index, epoch, size, tokens, self.budget.cost(tokens))

    def _check_fits(self, index: int, size: Size) -> int:
        """How many tokens a sample of this size has. Raises Unfit if no batch can hold it."""
        if size not in self._token_counts:
            try:
                self._token_counts[size] = self.budget.check(size)
            except Unfit as error:
                raise Unfit(f"{self._name(index)} {error}") from None
        return self._token_counts[size]

    def _name(self, index: int) -> str:
        name = getattr(self.source, "name", None)
        return f"sample {index}" if name is None else name(index)


def _fill(room: int, slack: int, tokens: list[int]) -> list[int]:
    """Places of numbers whose sum is within `slack` of `room`, or else as near as can be; the earliest that do.

    >>> _fill(10, 0, [6, 5, 5, 3]), _fill(10, 1, [6, 5, 5, 3])
    ([1, 2], [0, 3])

    Bit s of reach[i] says that some of tokens[i:] sum to s. Numbers that are large are rounded up first, to keep these small.
    """
    if sum(tokens) <= room:
        return list(range(len(tokens)))
    if room > LARGEST_ROOM:
        unit = -(-room // LARGEST_ROOM)
        room, slack, tokens = room // unit, slack // unit, [-(-count // unit) for count in tokens]
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
