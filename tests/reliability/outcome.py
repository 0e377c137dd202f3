"""What a reliability check found, as the line that it prints last and that docs/reliability.md is made of.

>>> print(Outcome("media", 500, 0, seconds=3.25, memory=700 << 20))
media: 500 cases, 0 failed, longest 3.2 s, at most 700 MiB
"""

from __future__ import annotations

import re
from typing import NamedTuple

LINE = re.compile(r"^([^:\n]+): (\d+) cases, (\d+) failed(?:, longest ([\d.]+) s)?(?:, at most (\d+) MiB)?$", re.MULTILINE)


class Outcome(NamedTuple):
    """seconds and memory (bytes): the most that one case took, where cases are measured. A name has no colon."""

    name: str
    cases: int
    failed: int
    seconds: float | None = None
    memory: int | None = None

    def __str__(self) -> str:
        if ":" in self.name:  # nobody would read its line
            raise ValueError(f"Outcome: name: expected one without a colon, got {self.name!r}")
        longest = "" if self.seconds is None else f", longest {self.seconds:.1f} s"
        most = "" if self.memory is None else f", at most {self.memory >> 20} MiB"
        return f"{self.name}: {self.cases} cases, {self.failed} failed{longest}{most}"

    def plus(self, other: Outcome) -> Outcome:
        """Both, of one name."""
        seconds = [one for one in (self.seconds, other.seconds) if one is not None]
        memory = [one for one in (self.memory, other.memory) if one is not None]
        both = self.cases + other.cases, self.failed + other.failed
        return Outcome(self.name, *both, max(seconds, default=None), max(memory, default=None))


def outcomes(text: str) -> list[Outcome]:
    """Those that a check printed."""
    found = []
    for name, cases, failed, seconds, mebibytes in LINE.findall(text):
        found.append(
            Outcome(
                name,
                int(cases),
                int(failed),
                float(seconds) if seconds else None,
                int(mebibytes) << 20 if mebibytes else None,
            )
        )
    return found
