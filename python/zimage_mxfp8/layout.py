"""Shapes of MXFP8 codes and of their blocked scales.

Format: OCP Microscaling Formats v1.0, blocks of 32 along the last axis; scales in the 128x4 blocked
layout that Blackwell's tensor cores read.
"""

from __future__ import annotations


def round_up(size: int, multiple: int) -> int:
    """Round a size up to a multiple."""
    return -(-size // multiple) * multiple


def padded_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """Shape of the codes of a matrix: both sizes rounded up to a multiple of 32."""
    rows, cols = shape
    return round_up(rows, 32), round_up(cols, 32)


def scale_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """Shape of the blocked scales of a matrix (`shape` before padding)."""
    rows, cols = padded_shape(shape)
    return round_up(rows, 128), round_up(cols // 32, 4)
