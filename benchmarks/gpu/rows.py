"""What a process of the driver reports: rows, a line of JSON each on its standard output, which the driver reads as they come.

{"begin": 3, "item": "rope_3d, bfloat16"}    it begins its item of this number
{"skipped": "no GPU"}                        nothing of it can run, and why
{"op": "rope_3d", "pass": "forward", ...}    a measurement
{"check": "rope_3d, bfloat16", "ok": true}   a check
{"test": "tests/test_rope.py::...", "outcome": "passed"}
{"error": "...", "item": ...}                the item failed
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from typing import Any

# The variables that say where a process that is started again goes on, and how many items it runs at most.
FIRST, MOST = "GPU_FIRST_ITEM", "GPU_MOST_ITEMS"
FAILED_GPU = 17  # the exit status of a process whose GPU context is of no more use
_MARK = "@row "
_ROW = re.compile(rf"{_MARK}(\{{.*\}})$")
# Of its own, as pytest and others take the standard output away.
_output = os.dup(1)


def emit(**row: Any) -> None:
    os.write(_output, f"{_MARK}{json.dumps(row, default=str)}\n".encode())


def first_item() -> int:
    return int(os.environ.get(FIRST, "0"))


def most_items() -> int:
    return int(os.environ.get(MOST, "1000000"))


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:400]


def parsed(line: str) -> tuple[str, dict[str, Any] | None]:
    """A line of output as (what belongs to the log, the row in it if any)."""
    found = _ROW.search(line)
    if found is None:
        return line, None
    try:
        return line[: found.start()], json.loads(found[1])
    except ValueError:  # cut off, as the process was
        return line, None


def of_kind(rows: list[dict[str, Any]], key: str) -> Iterator[dict[str, Any]]:
    return (row for row in rows if key in row)
