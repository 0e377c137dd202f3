"""Actions of a simulated world, which may leave out what they are about: `about`."""

from __future__ import annotations

# An action that begins with one of these names an object; a pronoun stands for the present one.
DETERMINERS = {
    "a", "an", "the", "one", "two", "three", "four", "five", "some", "many", "several", "another", "no", "every", "all",
    "my", "your", "his", "her", "its", "our", "their",
}  # fmt: skip
PRONOUNS = {"it", "he", "she", "they"}
VERBS = {"is", "are", "was", "were", "has", "have"}


def about(present: str, action: str) -> str:
    """The prompt of an action: its own words if it begins with an article or the like, else about what the present prompt is about.

    >>> about("a red circle moves right", "moves up")
    'a red circle moves up'
    >>> about("a red circle moves right", "a blue star stays still")
    'a blue star stays still'
    """
    words = action.split()
    first = words[0].lower() if words else ""
    if not first or first in DETERMINERS or action.lower().startswith(_subject(present).lower()):
        return action
    return " ".join([_subject(present), *(words[1:] if first in PRONOUNS else words)])


def _subject(prompt: str) -> str:
    """The words of a prompt before its verb, which is taken for the first one in -s, but for -ss; all, if there is none."""
    words = prompt.rstrip(" .").split()
    for i, word in enumerate(words):
        if i and (word in VERBS or (word.endswith("s") and not word.endswith("ss"))):
            return " ".join(words[:i])
    return " ".join(words)
