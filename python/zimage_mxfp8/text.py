"""Wording of sentences and tables."""

from __future__ import annotations

import re
from collections.abc import Collection

_MAX_DIGITS = 9  # of a number in a name that is sorted as one


def plural(count: int, one: str, many: str | None = None) -> str:
    """Return a count with its noun: "1 layer", "1,234 layers"."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def natural_order(name: str) -> str:
    """Return a key that sorts names with numbers as people do: "layers.9" before "layers.10"."""
    return re.sub(r"[0-9]+", lambda digits: digits[0].zfill(_MAX_DIGITS), name)


def printable(text: str) -> str:
    """Text without line breaks and control characters, which names in files may hold."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def did_you_mean(words: Collection[str], known: Collection[str]) -> str:
    """End of a sentence about unknown words: the known ones that are most like them, or nothing."""
    from difflib import get_close_matches

    found = dict.fromkeys(near for word in words for near in get_close_matches(word, known, 1))
    return f"; did you mean {' '.join(found)}?" if found else ""
