"""JSON and text that others wrote, within the limits of `sora_model.limits`: `read_json_file`, `read_json_for`, `read_text_file`.

JSON is read strictly: a name comes once in an object, numbers are finite, and lists and objects are not nested without end.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from ..limits import OverLimit, check_limit, hint, limits

OBJECT = 4  # values that take as much memory as an object
DIGITS = 40  # of a whole number; tokenizers say 10**30 where they have no limit


def read_text_file(path: Path, limit: str) -> str:
    """A text in UTF-8, with or without a byte order mark.

    limit: the name of one of `Limits`, which holds for its bytes.

    Raises OverLimit for a longer one, ValueError for what is not UTF-8 and for what is no file. OSError: it cannot be read.
    """
    return read_bytes_file(path, limit).decode("utf-8-sig")


def read_bytes_file(path: Path, limit: str, each: int = 1) -> bytes:
    """The bytes of a file, within the limit of that name.

    each: bytes at most of a character, where the limit is of those. A file that grows meanwhile is not read further.

    Raises OverLimit for more, ValueError for what is no file: a pipe would be waited for. OSError: it cannot be read.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path}: expected a file, got a pipe or a device, which might be waited for")
    most = each * getattr(limits(), limit)
    with path.open("rb") as file:
        size = path.stat().st_size
        data = file.read(most + 1) if 0 < size <= most else b""  # files of the kernel have no size, and may be waited for
    size = max(size, len(data))
    if size > most:  # a character has a byte at least
        expected, got = (f"{most} bytes", f"{size}") if each == 1 else (f"{most // each} characters", f"{size} bytes")
        raise OverLimit(f"{path}: expected at most {expected}, got {got}; {hint(limit, size)}")
    return data


def read_json_file(path: Path, limit: str = "json_bytes", *, constants: bool = False) -> Any:
    """What a JSON file holds.

    limit: of its bytes. constants: NaN and Infinity are numbers, too, as in some configs of transformers.

    Raises ValueError that says what is wrong with it, but for the file's name where it is no JSON; OverLimit names it, too.
    OSError: it cannot be read.
    """
    return read_json_text(read_text_file(path, limit), str(path), constants=constants)


def check_items(text: str, where: str) -> None:
    """Raises ValueError for more than the limit of lists, objects and values in JSON, which takes 50 times as much memory as text.

    Signs within texts are counted, too. where: how the error begins.
    """
    items = 1 + text.count(",") + text.count("[") + OBJECT * text.count("{")
    check_limit("json_items", items, where, "lists, objects and values")


def read_json_for(owner: str, path: Path, limit: str = "json_bytes", *, constants: bool = False) -> Any:
    """`read_json_file`, whose errors begin with `owner` and the file's name."""
    try:
        return read_json_file(path, limit, constants=constants)
    except OverLimit as error:
        raise ValueError(f"{owner}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{owner}: {path}: expected JSON, got {error}") from None
    except OSError as error:
        raise type(error)(f"{owner}: cannot read {path}: {error.strerror}") from None


def read_json_text(text: str, where: str, *, constants: bool = False) -> Any:
    """What a text in JSON holds, whose length is its caller's; raises as `read_json_file` does. where: what OverLimit names."""
    check_items(text, where)
    try:
        values = json.loads(
            text,
            object_pairs_hook=_once,
            parse_constant=float if constants else _no_number,
            parse_float=float if constants else _finite,
            parse_int=_whole,
        )
    except RecursionError:
        raise ValueError("lists and objects that are nested too deeply") from None
    check_limit("json_depth", _depth(values), f"{where}: its depth", "lists and objects within each other")
    return values


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names are all different: of two values for one, either may have been meant."""
    values = dict(pairs)
    if len(values) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{name} twice in one object")
    return values


def _no_number(name: str) -> float:
    raise ValueError(f"{name}, which is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.{DIGITS}}, which is too large a number")
    return value


def _whole(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _depth(values: Any) -> int:
    """Of lists and objects, without recursion."""
    depth, level = 0, [values]
    while level := [one for one in level if isinstance(one, dict | list)]:
        depth += 1
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    return depth
