"""How long the sentences of a Markdown file are: python -m tests.prose README.md docs/*.md

Counted is running text, lists among it. Headings, code, tables, images, HTML and the addresses of links are not.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple

_FENCED = re.compile(r"^( *)(```|~~~).*?^\1\2 *$", re.MULTILINE | re.DOTALL)
_DROPPED = re.compile(r"<!--.*?-->|!\[[^\]]*\]\([^)]*\)|<[^>\n]+>", re.DOTALL)
_LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")
_CODE = re.compile(r"`[^`\n]+`")
_BLOCK_START = re.compile(r"^ *(?:[-*+]|\d+\.) +")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')*_]*\s+(?=[\"'(*_]*[A-Z0-9])")


class Prose(NamedTuple):
    mean: float
    longest: int
    sentence: str  # the longest one


def sentences(markdown: str) -> list[str]:
    """The sentences of running text, in order."""
    text = _DROPPED.sub("", _FENCED.sub("", markdown))
    text = _LINK.sub(r"\1", _CODE.sub("Code", text))  # a piece of code is one word
    blocks: list[str] = [""]
    for line in text.splitlines():
        if not line.strip() or line.lstrip().startswith(("|", "#")):
            blocks.append("")
        elif _BLOCK_START.match(line):
            blocks.append(_BLOCK_START.sub("", line))
        else:
            blocks[-1] += " " + line.strip()
    found = [one.strip() for block in blocks for one in _SENTENCE_END.split(block.strip())]
    return [one for one in found if words(one)]


def words(sentence: str) -> int:
    return sum(any(letter.isalnum() for letter in word) for word in sentence.split())


def measure(markdown: str) -> Prose:
    """The mean and the longest sentence, in words."""
    found = sentences(markdown)
    if not found:
        return Prose(0.0, 0, "")
    longest = max(found, key=words)
    return Prose(sum(map(words, found)) / len(found), words(longest), longest)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        prose = measure(Path(name).read_text())
        print(f"{name}: mean {prose.mean:.1f}, longest {prose.longest}: {prose.sentence}")
