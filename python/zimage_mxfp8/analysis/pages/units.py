"""Units for columns and axes of sizes."""

from __future__ import annotations

_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def fitting_unit(nbytes: int) -> tuple[int, str]:
    """Return the number of bytes of the largest binary unit that a size has one of, and its name.

    Args:
        nbytes: the largest size that is shown in it.
    """
    return next(((unit, name) for unit, name in _UNITS if nbytes >= unit), (1, "B"))
