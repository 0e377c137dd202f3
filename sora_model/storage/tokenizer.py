"""What tokenizers of others may do to a text: `check_tokenizer`, `tokenize`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .documents import read_json_file

GROWTH = 256  # times that the rules of a tokenizer may make a text longer
PARTS = 256  # of a template that puts special tokens around a text


def check_tokenizer(path: Path, owner: str) -> None:
    """Raises ValueError for a tokenizer.json that is no object or whose rules make a text longer without bounds."""
    try:
        values = read_json_file(path, "tokenizer_bytes", constants=True)
    except ValueError as error:
        raise ValueError(f"{owner}: {path}: expected JSON, got {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{owner}: {path}: expected an object, got {type(values).__name__}")
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        growth = 1
        for rule in _objects(values.get(name)):
            growth *= _growth(rule)
            if growth > GROWTH:
                raise ValueError(f"{owner}: {path}: {name}: expected rules that make a text at most {GROWTH} times as long")
    for rule in _objects(values.get("post_processor")):
        for kind in ("single", "pair"):
            parts = rule.get(kind)
            if isinstance(parts, list) and len(parts) > PARTS:
                raise ValueError(f"{owner}: {path}: {kind}: expected at most {PARTS} parts, got {len(parts)}")
        tokens = rule.get("special_tokens")
        for token in tokens.values() if isinstance(tokens, dict) else ():
            if isinstance(token, dict) and isinstance(token.get("ids"), list) and len(token["ids"]) > PARTS:
                raise ValueError(f"{owner}: {path}: special_tokens: expected at most {PARTS} ids of each, got {len(token['ids'])}")


def _growth(rule: dict[str, Any]) -> int:
    """How many times as long a rule may make a text."""
    content, pattern = rule.get("content"), rule.get("pattern")
    if not isinstance(content, str):
        return 1
    text = pattern.get("String") if isinstance(pattern, dict) else None
    if isinstance(text, str) and text:
        return max(-(-len(content.encode("utf-8", "replace")) // len(text.encode("utf-8", "replace"))), 1)
    return 1 + len(content.encode("utf-8", "replace"))  # an expression may match what is empty, before each character


def _objects(values: Any) -> list[dict[str, Any]]:
    """All objects in a document."""
    found, left = [], [values]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            found.append(one)
            left += one.values()
        elif isinstance(one, list):
            left += one
    return found


def is_librarys(error: BaseException) -> bool:
    """Whether an error is one that the tokenizers library raises: plain ones, and panics, which are no Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def tokenize(tokenizer: Any, texts: Any, rows: int, owner: str, **options: Any) -> Any:
    """tokenizer(texts, **options).

    rows: of the table of vectors that the ids are for.

    Raises ValueError for a tokenizer that fails on the texts or gives ids that the table does not have.
    """
    try:
        batch = tokenizer(texts, **options)
    except BaseException as error:
        if not is_librarys(error):
            raise
        raise ValueError(f"{owner}: tokenizer: expected one that can read the texts, got {error}") from None
    ids = batch["input_ids"]
    nested = ids.tolist() if hasattr(ids, "tolist") else ids
    flat = nested if nested and not isinstance(nested[0], list) else [one for row in nested for one in row]
    if flat and not 0 <= min(flat) <= max(flat) < rows:
        raise ValueError(f"{owner}: tokenizer: expected ids from 0 to {rows - 1}, got {max(flat)}")
    return batch
