"""Wording of sentences and tables."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

_MAX_DIGITS = 9  # of a number in a name that is sorted as one


def plural(count: int, one: str, many: str | None = None) -> str:
    """Return a count with its noun: "1 layer", "1,234 layers"."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def natural_order(name: str) -> str:
    """Return a key that sorts names with numbers as people do: "layers.9" before "layers.10"."""
    return re.sub(r"[0-9]+", lambda digits: digits[0].zfill(_MAX_DIGITS), name)


def printable(text: str) -> str:
    """Replace line breaks and control characters, which names in files may hold."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def is_web_address(text: str) -> bool:
    """Return whether a text begins like "https://", as no path does."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text) is not None


def did_you_mean(words: Collection[str], known: Collection[str]) -> str:
    """Return the end of a sentence about unknown words: the most similar known ones, or nothing."""
    return suggestion(near for word in words for near in nearest(word, known))


def nearest(word: str, known: Collection[str], cutoff: float = 0.6) -> list[str]:
    """Return the known word that is most similar, if one is at least as similar as `cutoff`."""
    from difflib import get_close_matches

    return get_close_matches(word, known, 1, cutoff)


def suggestion(words: Iterable[str]) -> str:
    """Return the end of a sentence that asks whether these words were meant, or nothing."""
    distinct = list(dict.fromkeys(words))
    return f"; did you mean {' '.join(distinct)}?" if distinct else ""
