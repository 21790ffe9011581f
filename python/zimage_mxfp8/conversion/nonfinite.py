"""Search for NaN and Inf in the bytes of floating-point tensors."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from ..checkpoint.source import SourceTensor
from ..dtypes import SAFETENSORS_BITS
from ..errors import NonFiniteError

# Bits that are all set in a NaN or an infinity, and in nothing else.
_MASKS: Final[dict[str, int]] = {
    "F64": 0x7FF0000000000000,
    "F32": 0x7F800000,
    "BF16": 0x7F80,
    "F16": 0x7C00,
    "F8_E5M2": 0x7C,
    "F8_E4M3": 0x7F,
}

KEEP_HINT: Final = '`nonfinite="keep"` keeps such tensors unchanged'


def can_be_nonfinite(dtype: str) -> bool:
    """Return whether `first_nonfinite` supports a safetensors dtype."""
    return dtype in _MASKS


def first_nonfinite(dtype: str, data: npt.NDArray[np.uint8]) -> int | None:
    """Return the number of the first element that is NaN or infinite.

    Args:
        dtype: a safetensors dtype for which `can_be_nonfinite`.
        data: whole elements, as bytes.
    """
    bits = data.view(f"u{SAFETENSORS_BITS[dtype] // 8}")
    mask = bits.dtype.type(_MASKS[dtype])
    found = (bits & mask) == mask
    return int(found.argmax()) if found.any() else None


class KeptTensorCheck:
    """A check for NaN and Inf in tensors that a conversion copies unchanged.

    Attributes:
        found: names of the tensors with such values, if they are to be kept.
    """

    def __init__(self, *, keep: bool) -> None:
        self.found: set[str] = set()
        self._keep = keep

    def check(self, tensor: SourceTensor, begin: int, data: npt.NDArray[np.uint8]) -> None:
        """Check the bytes of a tensor from byte `begin` on, whole elements.

        Raises:
            NonFiniteError: there is NaN or Inf, and such tensors must not be kept.
        """
        if not can_be_nonfinite(tensor.dtype):
            return
        at = first_nonfinite(tensor.dtype, data)
        if at is None:
            return
        if self._keep:
            self.found.add(tensor.name)
            return
        element = begin // (SAFETENSORS_BITS[tensor.dtype] // 8) + at
        row, column = divmod(element, max(tensor.shape[-1], 1)) if tensor.shape else (0, 0)
        raise nonfinite_error(tensor, row, column, KEEP_HINT)


def nonfinite_error(tensor: SourceTensor, row: int, column: int, hint: str = "") -> NonFiniteError:
    """Return the error for NaN or Inf in a tensor; rows are those of a matrix of its last axis."""
    return NonFiniteError(
        f'{tensor.segments[0].path}: tensor "{tensor.name}" has NaN or Inf at row {row}, column '
        f"{column}",
        row,
        column,
        hint,
    )
