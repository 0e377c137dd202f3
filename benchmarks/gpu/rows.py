"""What a process of the driver reports: rows, a line of JSON each on its standard output, which the driver reads as they come.

{"begin": 3, "item": "rope_3d, bfloat16"}    it begins its item of this number
{"skipped": "no GPU"}                        nothing of it can run, and why
{"op": "rope_3d", "pass": "forward", ...}    a measurement
{"check": "rope_3d, bfloat16", "ok": true}   a check
{"test": "tests/test_rope.py::...", "outcome": "passed"}
{"error": "...", "item": ...}                the item failed
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from typing import Any

# The variables that say where a process that is started again goes on, and how many items it runs at most.
FIRST, MOST = "GPU_FIRST_ITEM", "GPU_MOST_ITEMS"
FAILED_GPU = 17  # the exit status of a process whose GPU context is of no more use
_MARK = "@row "


@functools.cache
def output() -> int:
    """The standard output as it was when this was called first: before pytest, for one, took it away."""
    return os.dup(1)


def emit(**row: Any) -> None:
    os.write(output(), f"{_MARK}{json.dumps(row, default=str)}\n".encode())


def first_item() -> int:
    return int(os.environ.get(FIRST, "0"))


def most_items() -> int:
    return int(os.environ.get(MOST, "1000000"))


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:400]


def parsed(line: str) -> tuple[str, dict[str, Any] | None]:
    """A line of output as (what belongs to the log, the row that it ends in, if any)."""
    line = line.rstrip("\r")
    mark = line.find(_MARK) if line.endswith("}") else -1
    while mark >= 0:
        try:
            row = json.loads(line[mark + len(_MARK) :])
        except (ValueError, RecursionError):  # cut off, as the process was, or none
            row = None
        if isinstance(row, dict):
            return line[:mark], row
        mark = line.find(_MARK, mark + 1)
    return line, None


def of_kind(rows: list[dict[str, Any]], key: str) -> Iterator[dict[str, Any]]:
    return (row for row in rows if key in row)
