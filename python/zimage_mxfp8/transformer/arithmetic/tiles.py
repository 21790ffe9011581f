"""Tiles of rows: torch operations one after another need their temporaries for one tile only."""

from __future__ import annotations

import math
from collections.abc import Iterator

# Elements of activations: enough that launches cost little, and 32 MiB in float32.
TILE = 1 << 23
# Elements of weights: enough for products at full speed, and 64 MiB in bfloat16.
WEIGHT_TILE = 1 << 25


def row_tiles(rows: int, columns: int, most: int, multiple: int = 1) -> Iterator[slice]:
    """Slices of a matrix's rows, about equal.

    Args:
        rows: of the matrix.
        columns: of the matrix.
        most: elements of a tile, about.
        multiple: each tile but the last has a multiple of this number of rows.
    """
    count = max(math.ceil(rows * columns / most), 1)
    step = max(math.ceil(rows / count / multiple), 1) * multiple
    for begin in range(0, rows, step):
        yield slice(begin, min(begin + step, rows))
