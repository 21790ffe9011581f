"""Patterns that find layers by name, for `convert --exclude-layers`."""

from __future__ import annotations

import re
from collections.abc import Iterable

_NUMBERED = re.compile(r"(.*?\.)(0|[1-9][0-9]*)(\..+)", re.DOTALL)


def merged_pattern(names: Iterable[str], *, whole: bool = False) -> str | None:
    r"""Return a pattern that finds names, with those that differ in their block's number merged.

    "layers.1.attention.qkv.weight" and "layers.12.attention.qkv.weight" become
    `layers\.(1|12)\.attention\.qkv\.weight`.

    Args:
        names: full names of weights.
        whole: find no longer name that has one of them inside.

    Returns:
        The pattern; None if there are no names.
    """
    blocks: dict[tuple[str, str], list[str]] = {}
    alternatives: dict[tuple[str, str], str] = {}
    for name in sorted(names):
        match = _NUMBERED.fullmatch(name)
        key = (match[1], match[3]) if match else (name, "")
        alternatives[key] = re.escape(name)
        if match:
            blocks.setdefault(key, []).append(match[2])
    for (head, tail), numbers in blocks.items():
        choices = "|".join(sorted(numbers, key=lambda digits: (len(digits), digits)))
        alternatives[head, tail] = rf"{re.escape(head)}({choices}){re.escape(tail)}"
    pattern = "|".join(alternatives.values())
    if not pattern:
        return None
    return f"^({pattern})$" if whole else pattern
