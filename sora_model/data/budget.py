"""What a batch holds, what a sample takes of it, and how a clip is cut and scaled to fit: `TokenBudget`, `Fit`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from ..sizes import Size, Timing


class Unfit(ValueError):
    """A sample that no batch can hold: larger than the budget, or not of whole patches."""


class Wording(NamedTuple):
    """How messages call the budget, and what they advise where it is too small."""

    limit: str = "tokens_per_batch ="
    remedy: str = "it takes a larger budget, or smaller or shorter samples"


PLAIN = Wording()


@dataclass(frozen=True)
class TokenBudget:
    """The tokens that a batch holds, and how many a sample is; for the arguments see `PackedSampler`.

    >>> budget = TokenBudget((1, 8, 8), 256)
    >>> budget.count((4, 32, 48)), budget.holds((4, 32, 48)), budget.holds((16, 32, 48))
    (96, True, False)
    """

    patch_size: Size
    tokens_per_batch: int
    latent_size: Callable[[Size], Size] | None = None
    attention_width: int | None = None
    wording: Wording = PLAIN

    def count(self, size: Size) -> int:
        """Tokens of a sample. Raises Unfit if it is not of whole patches."""
        latent = self.latent_size(size) if self.latent_size else size
        if any(length % patch for length, patch in zip(latent, self.patch_size, strict=True)):
            what = f"{size}, as a latent {latent}," if self.latent_size else f"{size}"
            raise Unfit(f"of size {what} does not divide by patch_size {self.patch_size}")
        return prod(latent) // prod(self.patch_size)

    def cost(self, tokens: int) -> int:
        """What so many tokens of one sample count for."""
        return tokens if self.attention_width is None else round(tokens * (1 + tokens / (6 * self.attention_width)))

    def holds(self, size: Size) -> bool:
        return self.cost(self.count(size)) <= self.tokens_per_batch

    def check(self, size: Size) -> int:
        """Tokens of a sample. Raises Unfit if no batch can hold it."""
        tokens = self.count(size)
        if (cost := self.cost(tokens)) > self.tokens_per_batch:
            cost_of_it = "" if self.attention_width is None else f" that count as {cost}"
            raise Unfit(
                f"of size (T, H, W) = {size} is {tokens} tokens{cost_of_it} at patch_size {self.patch_size}, "
                f"more than {self.wording.limit} {self.tokens_per_batch}; {self.wording.remedy}"
            )
        return tokens

    @property
    def longest(self) -> int:
        """Tokens of the largest sample that fits."""
        return largest(self.tokens_per_batch, lambda tokens: self.cost(tokens) <= self.tokens_per_batch)


class Limits(NamedTuple):
    """The most frames that are taken of a file, and the most pixels of each; None is no such limit."""

    frames: int
    pixels: int | None


@dataclass(frozen=True)
class Fit:
    """Cuts and scales the clips that no batch can hold. Those that fit stay as they are.

    A clip is first cut. Where that would leave it fewer token frames than a cube of tokens has along a side, it keeps so many
    frames and is scaled down.

    budget: what a batch holds. cut, scale: what may be done to a clip.
    """

    budget: TokenBudget
    cut: bool = True
    scale: bool = True

    def limits(self, planned: Callable[[Limits], Size | None], most: Limits, pixels: int, unit: Size, timing: Timing) -> Limits:
        """Limits within `most` that fit a clip; `most` itself where it fits already, or where nothing that may be done is enough.

        planned: the size (T, H, W) of the clip within limits, None where that is less than a token. pixels: of a frame of the
        file. unit: pixels of a token along T, H and W.
        """

        def fits(frames: int, pixels: int | None) -> bool:
            size = planned(Limits(frames, pixels))
            return size is None or self.budget.holds(size)

        limits = most
        if self.cut and not fits(*limits):
            whole = largest(most.frames, lambda n: n <= timing.first or fits(n, most.pixels))
            limits = Limits(max(whole, self._fewest(most.frames, unit, timing)) if self.scale else whole, most.pixels)
        if self.scale and not fits(*limits):
            limits = Limits(limits.frames, largest(min(pixels, most.pixels or pixels), lambda n: fits(limits.frames, n)))
        return limits if planned(limits) is not None and fits(*limits) else most

    def _fewest(self, frames: int, unit: Size, timing: Timing) -> int:
        """Frames, out of so many, that a clip keeps even if it must be scaled down for them."""
        side, frames = round(self.budget.longest ** (1 / 3)), timing.within(frames)
        while frames > timing.first and self.budget.count((frames, *unit[1:])) > side:
            frames -= timing.stride
        return frames


def largest(limit: int, holds: Callable[[int], bool]) -> int:
    """The largest number from 1 to `limit` of which something holds that holds of all smaller ones; 1 if it holds of none."""
    low, high = 1, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
