"""Text that others wrote, as the command line takes and shows it: `is_utf8`, `one_line`, `visible`."""

from __future__ import annotations

import re

# Control characters but for line breaks and tabs, marks that turn the direction of writing, and halves of characters.
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
BREAK = re.compile("[\n\u2028\u2029]")


def visible(text: str) -> str:
    """Text that a terminal only shows: control characters, which could steer it, and halves of characters as Python writes them.

    >>> visible("a \\x1b[31m cat")
    'a \\\\x1b[31m cat'
    """
    return STEERING.sub(lambda match: repr(match[0])[1:-1], text)


def one_line(text: str) -> str:
    """The same on one line: a name with a line break in it may not write another line, such as a false error.

    >>> one_line("a.png\\nerror: b.png")
    'a.png error: b.png'
    """
    # Of whole runs of blanks: an expression that looks for a break in one would take the square of its length.
    return visible(re.sub(r"\s+", lambda run: " " if BREAK.search(run[0]) else run[0], text.strip()))


def is_utf8(text: str) -> bool:
    """Whether text can be written: what a shell passes on may be any bytes, which Python keeps as halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
