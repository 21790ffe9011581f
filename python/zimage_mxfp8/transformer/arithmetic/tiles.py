"""Tiles of rows: torch operations one after another need their temporaries for one tile only."""

from __future__ import annotations

from collections.abc import Iterator

# Elements: enough that launches cost little, and 32 MiB in float32.
TILE = 1 << 23


def row_tiles(rows: int, columns: int, multiple: int = 1) -> Iterator[slice]:
    """Slices of a matrix's rows with about `TILE` elements each.

    Args:
        rows: of the matrix.
        columns: of the matrix.
        multiple: each but the last has a multiple of this number of rows.
    """
    step = max(TILE // max(columns, 1) // multiple, 1) * multiple
    for begin in range(0, rows, step):
        yield slice(begin, min(begin + step, rows))
