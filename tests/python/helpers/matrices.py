"""Matrices and codes of every magnitude."""

from __future__ import annotations

import math

import numpy as np
import torch

import zimage_mxfp8 as zm


def equal_but_for_nan(found: torch.Tensor, want: torch.Tensor) -> bool:
    """The same bits, signs of zeros too, and NaN in the same places."""
    assert found.shape == want.shape and found.dtype == want.dtype
    integers = {2: torch.int16, 4: torch.int32}[found.dtype.itemsize]
    same = found.view(integers) == want.view(integers)
    return bool((same | (found.isnan() & want.isnan())).all())


def matrix_of(shape: tuple[int, int], seed: int, dtype: torch.dtype, special: bool) -> torch.Tensor:
    """Numbers of every magnitude that the dtype has; perhaps with zeros, NaN and infinities."""
    draw = np.random.default_rng(seed)
    rows, columns = shape
    spread = draw.choice([1, 8, 40, 250])
    exponents = draw.integers(-spread, spread + 1, (rows, columns)) / 2 + draw.integers(-60, 60)
    with np.errstate(all="ignore"):
        numbers = (draw.standard_normal(shape) * 2.0**exponents).astype(np.float32)
    numbers[~np.isfinite(numbers)] = 3.0e38
    if special:
        for value in (0.0, -0.0, math.nan, math.inf, -math.inf, 1e-45, -1e-40, 3.38e38):
            numbers[draw.random(shape) < draw.choice([0, 0.001, 0.3])] = value
        with np.errstate(all="ignore"):
            numbers[draw.random(rows) < 0.2] *= np.float32(draw.choice([0, 2.0**-120, 2.0**-100]))
    return torch.from_numpy(numbers).to(dtype)


def encoded_of(shape: tuple[int, int], seed: int, special: bool) -> zm.MXFP8Array:
    """Any codes under any scales; without `special` none of them NaN."""
    draw = np.random.default_rng(seed)
    rows, columns = shape
    codes = np.zeros((-(-rows // 32) * 32, -(-columns // 32) * 32), np.uint8)
    codes[:rows, :columns] = draw.integers(0, 256, shape)
    if draw.random() < 0.5:  # rows of small codes, of which scales move some up
        codes &= 0x9F
    if not special:
        codes[codes & 0x7F == 0x7F] = 0x3F
    spread = int(draw.choice([0, 2, 12, 40, 254]))
    low = int(draw.integers(0, 255 - spread))
    scales = draw.integers(low, low + spread + 1, (codes.shape[0], codes.shape[1] // 32))
    scales = scales.astype(np.uint8)
    if special:
        scales[draw.random(scales.shape) < 0.02] = 255
    if draw.random() < 0.3:
        codes[draw.random(len(codes)) < 0.3] = 0
    blocked = torch.from_numpy(zm.to_blocked(scales))
    return zm.MXFP8Array(torch.from_numpy(codes), blocked, shape)
