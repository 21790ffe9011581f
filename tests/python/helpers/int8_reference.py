"""INT8 with a scale per row of matrices that are rotated in blocks of 32 columns, by NumPy."""

from __future__ import annotations

import numpy as np

BLOCK = 32


def butterfly(matrix: np.ndarray) -> np.ndarray:
    """Return sums and differences of columns 1, 2, 4, 8 and 16 apart, in float32."""
    values = matrix.astype(np.float32).reshape(len(matrix), -1, BLOCK)
    for step in (1, 2, 4, 8, 16):
        pairs = values.reshape(*values.shape[:2], -1, 2, step)
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        values = np.stack((low + high, low - high), axis=-2).reshape(values.shape)
    return values.reshape(matrix.shape)


def encoded(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return codes and scales of rotated rows."""
    with np.errstate(all="ignore"):
        sums = butterfly(matrix)
        largest = np.abs(sums).max(axis=1)
        finite, zero = np.isfinite(largest), largest < 2.0**-100
        factors = np.float32(127) / largest
        codes = np.rint(sums.astype(np.float64) * factors[:, None])  # exact until it is rounded
    codes[zero | ~finite] = 0
    scales = largest / np.float32(127) * np.float32(BLOCK**-0.5)
    scales = np.where(zero, np.float32(0), scales)
    return codes.astype(np.int8), np.where(finite, scales, np.float32(np.nan))


def rounded(matrix: np.ndarray) -> np.ndarray:
    """Return what the codes of a matrix stand for, rotated back, in float32."""
    columns = matrix.shape[1]
    codes, scales = encoded(np.pad(matrix, ((0, 0), (0, -columns % BLOCK))))
    back = butterfly(codes * scales[:, None]) * np.float32(BLOCK**-0.5)
    return back[:, :columns]
