"""When the frames of a video are shown, and which one is shown at an even rate: `Timeline`."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from typing import NamedTuple


class Timeline(NamedTuple):
    """The time stamps of a video's frames, and the even rate at which they are taken: their number over its length.

    Frame n of `len(stamps)` is the one that is shown when a third of the n-th of as many equal intervals is over. With an even
    rate that is the n-th frame, even where stamps are rounded. Where the rate varies, frames are repeated and left out so that
    motion keeps its speed.

    >>> timeline = Timeline([0, 10, 20, 80], Fraction(1, 100), Fraction(4))  # of 1 second
    >>> [timeline.shown(n) for n in range(4)]
    [0, 2, 2, 3]

    stamps: rising, in ticks. tick: seconds. rate: frames per second.
    """

    stamps: Sequence[int]
    tick: Fraction
    rate: Fraction

    @classmethod
    def of_durations(cls, durations: Sequence[int], tick: Fraction) -> Timeline:
        """Of frames that follow each other, in ticks each. 10 ms or less count as 100 ms, as in browsers."""
        lengths = [length if length * tick > Fraction(1, 100) else int(Fraction(1, 10) / tick) for length in durations]
        return cls([0, *accumulate(lengths)][:-1], tick, len(lengths) / (sum(lengths) * tick))

    @classmethod
    def of_stamps(cls, stamps: Sequence[int], last: int, tick: Fraction, stated: Fraction | None) -> Timeline:
        """Of frames shown from `stamps` on, the last one for `last` ticks, 0 if that is not known.

        stated: the rate that the file gives. It is taken if it agrees with the stamps, which may be rounded, within a quarter
        of a frame over the whole length.
        """
        count, span = len(stamps), stamps[-1] - stamps[0]
        if not last:
            last = round(span / (count - 1)) if count > 1 else 0
        length = (span + last) * tick
        if stated and (length <= 0 or abs(stated * length - count) <= Fraction(1, 4)):
            return cls(stamps, tick, stated)
        return cls(stamps, tick, count / length if length > 0 else Fraction(1))

    def shown(self, number: int) -> int:
        """Which frame, counted from 0, is shown as number `number` at the even rate."""
        ticks = (number + Fraction(1, 3)) / (self.rate * self.tick)
        return bisect_right(self.stamps, self.stamps[0] + ticks) - 1
