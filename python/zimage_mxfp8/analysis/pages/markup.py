"""Elements of HTML and SVG, with every value in them escaped."""

from __future__ import annotations

import json
import re
from html import escape
from typing import Any

from ...text import printable

_VOID = frozenset(("input", "img", "br"))  # elements of HTML without an end tag


def text(content: str) -> str:
    """Return text for an element: escaped, control characters shown."""
    return escape(printable(content))


def breakable(content: str) -> str:
    """Return `text` that may break after the dots and underscores in names."""
    return re.sub(r"(?<=\w)([._])(?=[^\W\d])", r"\1<wbr>", text(content))


def element(name: str, content: str = "", /, **attributes: str | float | bool | None) -> str:
    """Return an element.

    Args:
        name: of the element.
        content: what is inside, as HTML: use `text` for everything that is not.
        attributes: by name, with "_" for "-" and after Python's keywords; numbers are written with
            two decimals at most, None and False are left out, and True has no value.
    """
    written = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{_value(value)}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    end = "" if name in _VOID else f"{content}</{name}>"
    return f"<{name}{written}>{end}"


def data(content: Any) -> str:
    """Return a script element with JSON, which ends at no "<" in it."""
    words = json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json">{words}</script>'


def _value(value: str | float) -> str:
    return text(value) if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")
