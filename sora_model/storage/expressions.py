"""Regular expressions in tokenizers of others, which could take hours on a line of text: `check_expression`.

The tokenizers library matches by trying: what an expression can match in several ways is tried in all of them before it fails, from
each character of a text. So what is bounded is in how many ways each of its alternatives can go on. Those of known tokenizers have
at most two repetitions, as in GPT-4o's `[\\p{Lu}...]*[\\p{Ll}...]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?`, which has 16 ways beside them.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

LONGEST = 4096  # characters of an expression
REPETITIONS = 2  # in one alternative: a text of n characters is tried in n^2 ways from each
WAYS = 1024  # in which the expression can go on besides
SIZE = 10_000  # of an expression whose repetitions are written out
FEW = 64  # a repetition of more, or of any number, is one of REPETITIONS; of up to so many it has as many ways

_OPEN = re.compile(r"\((?:\?(?:[:=!>]|<[=!]|<[A-Za-z_]\w*>|[ims-]+:))?")
_ATOM = re.compile(r"\\[pP]\{[^}]*\}|\\x\{[^}]*\}|\\[^kg1-9]|[^()|*+?\\\[]", re.DOTALL)
_COUNT = re.compile(r"(?P<sign>[*+?])[?+]?|\{(?P<low>\d*)(?P<comma>,?)(?P<high>\d*)\}\??")
_SIGNS = {"*": (0, math.inf), "+": (1, math.inf), "?": (0, 1)}


class Cost(NamedTuple):
    """Of a part of an expression: its repetitions, the ways to match it besides, and its atoms."""

    repetitions: int = 0
    ways: int = 1
    size: int = 0

    def then(self, other: Cost) -> Cost:
        return Cost(self.repetitions + other.repetitions, self.ways * other.ways, self.size + other.size)

    def either(self, other: Cost) -> Cost:
        return Cost(max(self.repetitions, other.repetitions), self.ways + other.ways, self.size + other.size)


class _Group:
    """What was read of a group: its finished alternatives, the present one, and that one's last part, which may be repeated."""

    def __init__(self) -> None:
        self.alternatives: Cost | None = None
        self.present, self.last = Cost(), Cost()

    def add(self, part: Cost) -> None:
        self.present, self.last = self.present.then(self.last), part

    def end(self) -> Cost:
        """Ends the alternative."""
        self.add(Cost())
        self.alternatives = self.present if self.alternatives is None else self.alternatives.either(self.present)
        self.present = self.last = Cost()
        return self.alternatives


def check_expression(text: str, where: str) -> None:
    """Raises ValueError, which begins with `where`, for an expression that could take too long, or is of a kind not known here."""
    try:
        if len(text) > LONGEST:
            raise _Refused(f"at most {LONGEST} characters")
        _read(text)
    except _Refused as refused:
        raise ValueError(f"{where}: expected an expression with {refused}, got {text[:80]!r}") from None


class _Refused(Exception):
    """What was expected of an expression."""


def _read(text: str) -> None:
    start = re.match(r"\(\?[ims-]+\)", text)  # an option for the whole expression
    place, groups = start.end() if start else 0, [_Group()]
    while place < len(text):
        sign = text[place]
        if sign == "(":
            opened = _OPEN.match(text, place)
            if opened is None or text[opened.end() : opened.end() + 1] == "?":
                raise _Refused("groups, options and looks around alone, as known tokenizers have")
            groups.append(_Group())
            place = opened.end()
        elif sign == ")":
            if len(groups) == 1:
                raise _Refused("a beginning for every end of a group")
            group = groups.pop().end()
            groups[-1].add(group)
            place += 1
        elif sign == "|":
            _check(groups[-1].end())
            place += 1
        elif sign == "[":
            groups[-1].add(Cost(size=1))
            place = _end_of_class(text, place)
        elif counted := _counted(text, place):
            groups[-1].last = _repeated(groups[-1].last, *_bounds(counted))
            place = counted.end()
        elif atom := _ATOM.match(text, place):
            groups[-1].add(Cost(size=1))
            place = atom.end()
        else:
            raise _Refused("no references to what was matched")
        _check(groups[-1].present.then(groups[-1].last))
    if len(groups) > 1:
        raise _Refused("an end for every group")
    _check(groups[0].end())


def _check(cost: Cost) -> None:
    if cost.repetitions > REPETITIONS:
        raise _Refused(f"at most {REPETITIONS} repetitions in an alternative")
    if cost.ways > WAYS or cost.size > SIZE:
        raise _Refused(f"at most {WAYS} ways to match and {SIZE} parts")


def _counted(text: str, place: int) -> re.Match[str] | None:
    found = _COUNT.match(text, place)
    return found if found and (found["sign"] or found["low"] or found["high"]) else None


def _bounds(counted: re.Match[str]) -> tuple[float, float]:
    if counted["sign"]:
        return _SIGNS[counted["sign"]]
    low = int(counted["low"] or 0)
    high = int(counted["high"]) if counted["high"] else math.inf if counted["comma"] else low
    return min(low, high), max(low, high)  # Oniguruma takes them in any order


def _repeated(part: Cost, low: float, high: float) -> Cost:
    if high > 1 and (part.repetitions or part.ways > 1):
        raise _Refused("repetitions of what matches in one way alone")
    size = part.size * int(max(low, 1 if high == math.inf else high))
    if high - low >= FEW:
        return Cost(part.repetitions + 1, part.ways, size)
    return Cost(part.repetitions, part.ways + int(high - low), size)


def _end_of_class(text: str, place: int) -> int:
    """Behind the bracket that ends a class, which may have others in it."""
    depth = 0
    while place < len(text):
        sign = text[place]
        if sign == "\\":
            place += 1
        depth += (sign == "[") - (sign == "]")
        place += 1
        if depth == 0:
            return place
    raise _Refused("an end for every class of characters")
