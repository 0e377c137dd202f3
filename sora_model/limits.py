"""The most that a file or text of others may ask for, in one place: `Limits`, `limits`, `set_limits`.

Whatever is over a limit is refused before memory or time is spent on it, by an error that names the limit. A user who trusts a file
raises it: `sora --limit picture-pixels=1e8 caption scan.png`, or in Python

>>> with raised_limits(picture_pixels=10**8):
...     limits().picture_pixels
100000000
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

MOST = 2**62  # of any limit
MOST_DENOISING_STEPS = 1000


class Limits(NamedTuple):
    """Each is the most that is taken.

    Args:
        picture_pixels: of a picture that is decoded: 8192 x 4096.
        video_pixels: of a video's frame; decoders hold several at once.
        frames: of a video file, whose time stamps are listed: nine hours at 30 a second.
        clip_pixels: of all frames that a command reads from one file, or from all that a batch file names: 3.2 GB in float32.
        json_bytes: of a config, an index of weights, or the file of `sora batch`.
        json_depth: of lists and objects within each other in it.
        json_items: of its lists, objects and values, as `sora_model.storage.documents.check_items` counts them: 100 bytes each.
        requests: of `sora batch`, which one pass makes together.
        header_bytes: of a safetensors file.
        tokenizer_bytes: of a tokenizer's file; the largest have 33 million.
        text: characters of a prompt, a caption or an action. Attention over words takes memory by their square.
        batch_text: characters of all texts of `sora batch`, which are encoded together.
    """

    picture_pixels: int = 2**25
    video_pixels: int = 2**24
    frames: int = 2**20
    clip_pixels: int = 2**28
    json_bytes: int = 2**24
    json_depth: int = 64
    json_items: int = 2**22
    requests: int = 1024
    header_bytes: int = 2**24
    tokenizer_bytes: int = 2**25
    text: int = 20_000
    batch_text: int = 200_000


_present = Limits()


def limits() -> Limits:
    """Those that hold now, in the whole process: files are read in several threads."""
    return _present


def set_limits(new: Limits) -> None:
    """Sets all of them.

    Raises:
        TypeError: no `Limits`. ValueError: one that is no whole number from 1 to 2**62.
    """
    global _present
    if not isinstance(new, Limits):
        raise TypeError(f"set_limits: new: expected Limits, got {type(new).__name__}")
    for name, value in new._asdict().items():
        if type(value) is not int or not 1 <= value <= MOST:
            raise ValueError(f"set_limits: {name}: expected a whole number from 1 to 2**62, got {value!r}")
    _present = new


@contextlib.contextmanager
def raised_limits(**changes: int) -> Iterator[None]:
    """Other limits within the block, in the whole process. Raises as `set_limits` does; ValueError for a name that there is not."""
    before = _present
    set_limits(changed(before, changes, "raised_limits"))
    try:
        yield
    finally:
        set_limits(before)


def changed(old: Limits, changes: dict[str, int], owner: str) -> Limits:
    """Some of them anew. Raises ValueError for a name that there is not."""
    for name in changes:
        if name not in Limits._fields:
            raise ValueError(f"{owner}: expected names out of {', '.join(Limits._fields)}, got {name}")
    return old._replace(**changes)


def hint(name: str, value: int) -> str:
    """How an error ends that says what is over a limit."""
    return f"'sora --limit {name.replace('_', '-')}={value} COMMAND ...' raises the limit"


class OverLimit(ValueError):
    """The message begins with what is over a limit and ends with how to raise it."""


def check_limit(name: str, value: int, where: str, unit: str, *, counted: bool = False) -> None:
    """Raises OverLimit for more than the limit `name`.

    where: what the error begins with. counted: there may be more, as counting stops at the limit; twice that is then named.
    """
    most = getattr(_present, name)
    if value > most and counted:
        raise OverLimit(f"{where}: expected at most {most} {unit}, got more; {hint(name, 2 * most)}")
    if value > most:
        raise OverLimit(f"{where}: expected at most {most} {unit}, got {value}; {hint(name, value)}")


def check_text(text: str, where: str) -> None:
    """Raises OverLimit for a text over the limit. where: the op or option and its argument."""
    check_limit("text", len(text), where, "characters")
