"""Regular expressions of tokenizers: those that are known are taken, and what is taken ends soon."""

import time

import pytest
import tokenizers

from sora_model.storage.expressions import check_expression

ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
REST = r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Of the tokenizers' published files.
KNOWN = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "qwen2": rf"{ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt4o": rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+{ENDINGS}?|[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*{ENDINGS}?|{REST}",
    "kimi": rf"[\p{{Han}}]+|[^\r\n\p{{L}}\p{{N}}]?[{UPPER}&&[^\p{{Han}}]]*[{LOWER}&&[^\p{{Han}}]]+{ENDINGS}?|{REST}",
    "deepseek": r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s+",
    "deepseek's letters": "[一-龥぀-ゟ゠-ヿ]+",  # noqa: RUF001
    "clip": r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    "bloom": r" ?[^(\s|[.,!?…。，、।۔،])]+",  # noqa: RUF001
    "falcon": "[0-9][0-9][0-9]",
    "digits from the right": r"(?=(\d{3})+(?!\d))",
    "t5": " {2,}",
    "blanks": r"\s+",
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_ones_are_taken(name: str) -> None:
    check_expression(KNOWN[name], "here")
    tokenizers.Regex(KNOWN[name])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(?:a|a){22}[^a]", "repetitions of what matches in one way alone"),
        ("(a+)+x", "repetitions of what matches in one way alone"),
        ("(a?){30}x", "repetitions of what matches in one way alone"),
        ("((a|b)c)*", "repetitions of what matches in one way alone"),
        ("a+*", "repetitions of what matches in one way alone"),
        ("a{1,3}+", "repetitions of what matches in one way alone"),
        ("(?:a?)" * 30, "at most 1024 ways to match"),
        ("a?" * 30 + "a" * 30, "at most 1024 ways to match"),
        ("a{0,20}" * 6, "at most 1024 ways to match"),
        ("(?:a|a)" * 22, "at most 1024 ways to match"),
        (".*.*.*x", "at most 2 repetitions in an alternative"),
        ("b|(.*)(.*)(?=.*x)", "at most 2 repetitions in an alternative"),
        ("a{0,100}.*.*", "at most 2 repetitions in an alternative"),
        ("((a{100}){100}){100}", "and 10000 parts"),
        ("a{100000}", "and 10000 parts"),
        (r"(a*)\1", "no references to what was matched"),
        (r"(?<n>a*)\k<n>", "no references to what was matched"),
        (r"(?<n>a|\g<n>)", "no references to what was matched"),
        ("(?~a)", "groups, options and looks around alone"),
        ("a(?i)b|c", "groups, options and looks around alone"),
        ("(?x) (a b) +", "groups, options and looks around alone"),
        ("(?(1)a|b)", "groups, options and looks around alone"),
        ("(a", "an end for every group"),
        ("a)", "a beginning for every end of a group"),
        ("[a", "an end for every class of characters"),
        ("a" * 5000, "at most 4096 characters"),
        ("(" * 2000 + ")" * 2000 + "(", "an end for every group"),
    ],
)
def test_others_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^here: expected an expression with .*{message}.*, got '"):
        check_expression(text, "here")


@pytest.mark.parametrize(
    "text", [".*.*x", "(?:a?|a)a?a?a?a?a?a?a*a*x", r"\s*\s*x", "(?=.*.*x)b", "[a-z]*[a-z]*(?:q|[a-z]x)?!", "(?i)a*a*x"]
)
def test_what_is_taken_ends_soon(text: str) -> None:
    """On a prompt that it matches nowhere, in a few seconds of this library at worst."""
    check_expression(text, "here")
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(text), "isolated")
    began = time.process_time()
    for prompt in ("a" * 300, " " * 300, "a photo of a cat in the snow, " * 10):
        split.pre_tokenize_str(prompt)
    assert time.process_time() - began < 5
