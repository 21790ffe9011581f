"""Element types: their names in safetensors files, in this package's API and their sizes."""

from __future__ import annotations

from typing import Final, Literal

import numpy as np
import numpy.typing as npt

DTypeName = Literal["bfloat16", "float16", "float32"]

# Bits of one element, in the order in which the safetensors library lays out tensors (widest
# first, then by its own ranking).
SAFETENSORS_BITS: Final[dict[str, int]] = {
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
    "F32": 32,
    "U32": 32,
    "I32": 32,
    "BF16": 16,
    "F16": 16,
    "U16": 16,
    "I16": 16,
    "F8_E5M2FNUZ": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E8M0": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "I8": 8,
    "U8": 8,
    "F6_E3M2": 6,
    "F6_E2M3": 6,
    "F4": 4,
    "BOOL": 8,
}

# The types that a weight may have before it is quantised.
FLOAT_NAMES: Final[dict[str, DTypeName]] = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
}


def as_integers(dtype: str, data: npt.NDArray[np.uint8]) -> npt.NDArray[np.generic]:
    """View bytes of BF16, F16 or F32 as integers of that width, as the core takes them."""
    return data.view(f"u{SAFETENSORS_BITS[dtype] // 8}")
