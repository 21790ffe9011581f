"""Wording of sentences and tables."""


def plural(count: int, one: str, many: str | None = None) -> str:
    """A count with its noun: "1 layer", "1,234 layers"."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def printable(text: str) -> str:
    """Text without line breaks and control characters, which names in files may hold."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
