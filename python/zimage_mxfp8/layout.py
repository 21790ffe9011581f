"""Shapes of MXFP8 codes and of their blocked scales.

Format: OCP Microscaling Formats v1.0, blocks of 32 along the last axis; scales in the 128x4 blocked
layout that Blackwell's tensor cores read.
"""

from __future__ import annotations

MXFP8_BLOCK = 32  # elements that share a scale
SCALE_TILE_ROWS = 128  # rows of a tile of blocked scales


def round_up(size: int, multiple: int) -> int:
    """Round a size up to a multiple."""
    return -(-size // multiple) * multiple


def padded_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """Return the shape of the codes of a matrix: both sizes rounded up to a multiple of 32."""
    rows, cols = shape
    return round_up(rows, MXFP8_BLOCK), round_up(cols, MXFP8_BLOCK)


def scale_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """Return the shape of the blocked scales of a matrix (`shape` before padding)."""
    rows, cols = padded_shape(shape)
    return round_up(rows, SCALE_TILE_ROWS), round_up(cols // MXFP8_BLOCK, 4)
