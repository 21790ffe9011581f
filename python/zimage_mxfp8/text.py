"""Wording that several sentences share."""


def plural(count: int, one: str, many: str | None = None) -> str:
    """A count with its noun: "1 layer", "1,234 layers"."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"
