"""Tiles of rows, so that a series of torch operations has the temporaries of one tile only."""

from __future__ import annotations

import math
from collections.abc import Iterator

# Elements of activations: enough that launches cost little, and 32 MiB in float32.
TILE = 1 << 23
# Elements of weights: enough for GEMMs at full speed, and 64 MiB in bfloat16.
WEIGHT_TILE = 1 << 25


def row_tiles(rows: int, columns: int, elements: int, multiple: int = 1) -> Iterator[slice]:
    """Return slices of a matrix's rows of about equal size.

    Args:
        rows: rows of the matrix.
        columns: columns of the matrix.
        elements: approximate number of elements of a tile.
        multiple: each tile except the last has a multiple of this number of rows.
    """
    count = max(math.ceil(rows * columns / elements), 1)
    step = max(math.ceil(rows / count / multiple), 1) * multiple
    for begin in range(0, rows, step):
        yield slice(begin, min(begin + step, rows))
