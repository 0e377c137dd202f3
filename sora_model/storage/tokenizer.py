"""What tokenizers of others may be and do to a text: `check_tokenizer_file`, `known_entries`, `tokenize`, `detokenize`; and
`save_tokenizer`."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..limits import check_limit
from .documents import read_json_for
from .expressions import check_expression

FORMS = {"NFKC": 11, "NFKD": 11, "NFC": 3, "NFD": 3}  # bytes that Unicode's normal forms make of one at most, of U+FDFA and others
GROWTH = 160  # times that the rules of a tokenizer may make a text longer; those of T5 could 136 times
EXPRESSIONS = 16  # regular ones; DeepSeek's has three
PARTS = 256  # of a template that puts special tokens around a text, and of their ids
VOCABULARY = 2**20  # tokens; a million take 4 s to be read
ADDED = 2**13  # tokens that are added to a vocabulary, of which transformers compares each with each; Gemma has 6,415
IDS = 2**22  # of tokens; libraries have tables up to the highest
TEXT = 1024  # bytes of a token, or of what a rule puts before or behind one: a text may have a copy for each of its characters
WORD = 1000  # characters of a word that is cut into pieces, which takes their square
# Entries of tokenizer_config.json and special_tokens_map.json that say how a text is read, beside names that end in "_token".
# Others would be arguments of classes of transformers, such as files to open.
ENTRIES = (
    "added_tokens_decoder",
    "additional_special_tokens",
    "extra_special_tokens",
    "extra_ids",
    "model_max_length",
    "padding_side",
    "truncation_side",
    "chat_template",
    "clean_up_tokenization_spaces",
    "add_prefix_space",
    "do_lower_case",
    "legacy",
    "spaces_between_special_tokens",
    "split_special_tokens",
)


def known_entries(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The entries of tokenizer_config.json or special_tokens_map.json that transformers may see. where: the file.

    Raises ValueError for too many or too long tokens, and for numbers that no tokenizer has.
    """
    kept = {
        name: value
        for name, value in values.items()
        if name in ENTRIES or (name.endswith("_token") and (value is None or isinstance(value, str | dict)))
    }
    if (longest := kept.get("model_max_length")) is not None:
        # Those without a limit have one of 10**30, which some write as a number with a point.
        if type(longest) not in (int, float) or not (longest >= 1 and longest == longest // 1):
            raise ValueError(f"{where}: model_max_length: expected a whole number of at least 1, got {longest!r}")
        kept["model_max_length"] = int(longest)
    extra = kept.get("extra_ids", 0)
    if type(extra) is not int or not 0 <= extra <= ADDED:
        raise ValueError(f"{where}: extra_ids: expected a whole number from 0 to {ADDED}, got {extra!r}")
    for name in ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"):
        if isinstance(tokens := kept.get(name), dict | list):
            check_added(tokens, f"{where}: {name}")
    check_added([name for name in kept if name.endswith("_token")], where)
    check_lengths({name: value for name, value in kept.items() if name != "chat_template"}, where)
    decoder = kept.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise ValueError(f"{where}: added_tokens_decoder: expected an object, got {type(decoder).__name__}")
    for key in decoder:
        if not (isinstance(key, str) and key.isdecimal() and len(key) < 10 and int(key) < IDS):
            raise ValueError(f"{where}: added_tokens_decoder: expected ids below {IDS}, got {key!r}")
    return kept


def check_added(tokens: Any, where: str) -> None:
    """Raises ValueError for more tokens than a tokenizer adds."""
    if len(tokens) > ADDED:
        raise ValueError(f"{where}: expected at most {ADDED} added tokens, got {len(tokens)}")


def check_lengths(values: Any, where: str) -> None:
    """Raises ValueError for a document with a text, keys included, that is longer than a token."""
    left = [values]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            left += one.keys()
            left += one.values()
        elif isinstance(one, list):
            left += one
        elif isinstance(one, str) and len(one) * 4 > TEXT and len(one.encode("utf-8", "replace")) > TEXT:
            raise ValueError(f"{where}: expected texts of at most {TEXT} bytes, got {one[:40]!r}...")


def check_tokenizer_file(path: Path, owner: str) -> None:
    """Raises ValueError for a tokenizer's file that is larger than the limits, or whose rules make a text longer without bounds."""
    check_limit("tokenizer_bytes", path.stat().st_size, f"{owner}: {path}", "bytes")
    where = f"{owner}: {path}"
    if path.name == "tokenizer.json":
        check_tokenizer(path, owner)
    elif path.suffix == ".json":
        values = read_json_for(owner, path, "tokenizer_bytes")
        if not isinstance(values, dict):
            raise ValueError(f"{where}: expected an object, got {type(values).__name__}")
        if path.name == "added_tokens.json":
            check_added(values, where)
        _check_vocabulary(values, where)
        check_lengths(values, where)
    elif path.suffix != ".jinja":
        data = path.read_bytes()
        check_limit("json_items", 1 + data.count(b"\n"), where, "lines or pieces")  # 10 is how a piece begins in spiece.model
        if path.suffix == ".model":
            _check_sentencepiece(data, where)


def check_tokenizer(path: Path, owner: str) -> None:
    """Raises ValueError for a tokenizer.json that is no object or whose rules make a text longer without bounds."""
    where = f"{owner}: {path}"
    values = read_json_for(owner, path, "tokenizer_bytes", constants=True)
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected an object, got {type(values).__name__}")
    check_growth([rule for name in ("normalizer", "pre_tokenizer") for rule in _objects(values.get(name))], f"{where}: normalizer")
    check_growth(_objects(values.get("decoder")), f"{where}: decoder")
    _check_expressions([rule for name in ("normalizer", "pre_tokenizer", "decoder") for rule in _objects(values.get(name))], where)
    _check_templates(_objects(values.get("post_processor")), where)
    added, model = values.get("added_tokens"), values.get("model")
    if isinstance(added, list):
        check_added(added, f"{where}: added_tokens")
        _check_vocabulary({str(i): one.get("id") for i, one in enumerate(added) if isinstance(one, dict)}, f"{where}: added_tokens")
    # Merges are of tokens of the vocabulary; the library refuses others.
    rest = {name: value for name, value in model.items() if name != "merges"} if isinstance(model, dict) else model
    for name, part in {"added_tokens": added, "model": rest, "post_processor": values.get("post_processor")}.items():
        check_lengths(part, f"{where}: {name}")
    _check_vocabulary(model.get("vocab") if isinstance(model, dict) else None, f"{where}: model")
    word = model.get("max_input_chars_per_word", 1) if isinstance(model, dict) else 1
    if type(word) is not int or not 0 <= word <= WORD:
        raise ValueError(f"{where}: model: max_input_chars_per_word: expected a whole number from 0 to {WORD}, got {word!r}")


def _check_expressions(rules: list[dict[str, Any]], where: str) -> None:
    expressions = [rule["Regex"] for rule in rules if isinstance(rule.get("Regex"), str)]
    if len(expressions) > EXPRESSIONS:
        raise ValueError(f"{where}: expected rules with at most {EXPRESSIONS} regular expressions, got {len(expressions)}")
    for text in expressions:
        check_expression(text, where)


def _check_vocabulary(tokens: Any, where: str) -> None:
    if isinstance(tokens, dict | list) and len(tokens) > VOCABULARY:
        raise ValueError(f"{where}: expected a vocabulary of at most {VOCABULARY} tokens, got {len(tokens)}")
    ids = tokens.values() if isinstance(tokens, dict) else ()
    if wrong := next((one for one in ids if type(one) is int and not 0 <= one < IDS), None):
        raise ValueError(f"{where}: expected ids from 0 to {IDS - 1}, got {wrong}")


def check_growth(rules: list[dict[str, Any]], where: str) -> None:
    """Raises ValueError for rules, one behind the other, that make a text more than GROWTH times as long."""
    growth = 1
    for rule in rules:
        growth *= _growth(rule)
        if growth > GROWTH:
            raise ValueError(f"{where}: expected rules that make a text at most {GROWTH} times as long")


def _growth(rule: dict[str, Any]) -> int:
    """How many times as long a rule may make a text."""
    content, pattern, front, table = (rule.get(name) for name in ("content", "pattern", "prepend", "precompiled_charsmap"))
    growth = FORMS.get(str(rule.get("type")), 1)
    if isinstance(table, str):
        growth *= _longest(_decoded(table))
    if isinstance(front, str):  # before each piece between added tokens, which may be one character
        growth *= 1 + len(front.encode("utf-8", "replace"))
    if isinstance(content, str):
        text = pattern.get("String") if isinstance(pattern, dict) else None
        size = len(content.encode("utf-8", "replace"))
        if isinstance(text, str) and text:
            growth *= max(-(-size // len(text.encode("utf-8", "replace"))), 1)
        else:  # an expression may match what is empty, before each character
            growth *= 1 + size
    return growth


def _decoded(table: str) -> bytes:
    try:
        return base64.b64decode(table)
    except ValueError:
        return b""  # transformers refuses it


def _longest(table: bytes) -> int:
    """Bytes of the longest text that SentencePiece's table puts in place of others: it ends with these, a zero byte behind each.

    In front of them are the size of a trie and the trie.
    """
    texts = table[4 + int.from_bytes(table[:4], "little") :]
    return max((len(text) for text in texts.split(b"\0")), default=1) or 1


def _check_templates(rules: list[dict[str, Any]], where: str) -> None:
    """Templates, one behind the other, may copy a text few times and put few tokens beside it."""
    copies, written = 1, 0
    for rule in rules:
        tokens = rule.get("special_tokens")
        named = tokens.values() if isinstance(tokens, dict) else ()
        ids = [len(token["ids"]) for token in named if isinstance(token, dict) and isinstance(token.get("ids"), list)]
        if max(ids, default=0) > PARTS:
            raise ValueError(f"{where}: special_tokens: expected at most {PARTS} ids of each, got {max(ids)}")
        parts = {kind: rule[kind] for kind in ("single", "pair") if isinstance(rule.get(kind), list)}
        for kind, listed in parts.items():
            if len(listed) > PARTS:
                raise ValueError(f"{where}: {kind}: expected at most {PARTS} parts, got {len(listed)}")
        copies *= max([1, *(_copies(listed) for listed in parts.values())])
        written += max(map(len, parts.values()), default=0) * max(ids, default=0)
        if copies > 2 or written > PARTS:
            expected = f"templates that have a text at most twice, and at most {PARTS} ids of special tokens"
            raise ValueError(f"{where}: post_processor: expected {expected}")


def _copies(parts: list[Any]) -> int:
    """How often a template has one text of a pair."""
    places = [part["Sequence"] for part in parts if isinstance(part, dict) and isinstance(part.get("Sequence"), dict)]
    return max((sum(place.get("id") == name for place in places) for name in ("A", "B")), default=0)


def _check_sentencepiece(data: bytes, where: str) -> None:
    """Raises ValueError for a spiece.model with a longer piece than a token, or whose table makes a text longer without bounds."""
    try:
        for field, value in _fields(data, where):
            if field == 1 and len(value) > TEXT:
                raise ValueError(f"{where}: expected pieces of at most {TEXT} bytes, got one of {len(value)}")
            if field == 3:  # its rules for a text
                for inner, table in _fields(value, where):
                    if inner == 2 and _longest(table) > GROWTH:
                        raise ValueError(f"{where}: expected rules that make a text at most {GROWTH} times as long")
    except IndexError:
        raise ValueError(f"{where}: expected a model of SentencePiece, got something else") from None


def _fields(data: bytes, where: str) -> Iterator[tuple[int, bytes]]:
    """Numbers and bytes of a message's fields, as protocol buffers write them; IndexError for what is none.

    Raises ValueError for more of them than a vocabulary and a few rules.
    """
    place = count = 0

    def number() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place, value, shift = place + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value
            if shift > 63:
                raise IndexError

    while place < len(data):
        key = number()
        size = {0: 0, 1: 8, 5: 4}.get(key & 7)
        if key & 7 == 0:
            number()
        if size is None:
            if key & 7 != 2:
                raise IndexError
            size = number()
        if place + size > len(data):
            raise IndexError
        count += 1
        if count > VOCABULARY + PARTS:
            raise ValueError(f"{where}: expected a vocabulary of at most {VOCABULARY} tokens, got more")
        yield key >> 3, data[place : place + size]
        place += size


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
    if isinstance(error, MemoryError):
        return False
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def save_tokenizer(tokenizer: Any, folder: str | Path) -> None:
    """tokenizer.save_pretrained(folder). OSError: it cannot be written, which the tokenizers library says by a plain Exception."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(str(error)) from None


def detokenize(tokenizer: Any, ids: Any, owner: str) -> str:
    """The text of ids, without special tokens. Raises ValueError for a tokenizer that fails on them."""
    try:
        return tokenizer.decode(ids, skip_special_tokens=True)
    except BaseException as error:
        if not is_librarys(error):
            raise
        raise ValueError(f"{owner}: tokenizer: expected one that can write the ids, got {error}") from None


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
        wrong = min(flat) if min(flat) < 0 else max(flat)
        raise ValueError(f"{owner}: tokenizer: expected ids from 0 to {rows - 1}, got {wrong}")
    return batch
