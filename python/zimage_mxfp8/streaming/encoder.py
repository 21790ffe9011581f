"""Encoders of rows to MXFP8, on the calling thread or on a GPU, with the same bytes."""

from __future__ import annotations

import contextlib
import threading
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .. import _core
from ..dtypes import DTypeName
from ..errors import Error

Bytes = npt.NDArray[np.uint8]


class Encoder(Protocol):
    """An encoder of rows, which threads may share."""

    def encode(
        self, matrix: npt.NDArray[np.generic], dtype: DTypeName, codes: Bytes, scales: Bytes
    ) -> None:
        """Encode a matrix.

        Args:
            matrix: [rows, columns], as integers of the element's width.
            dtype: dtype of the elements.
            codes: takes the E4M3 codes, padded rows times padded columns.
            scales: takes the blocked scales.

        Raises:
            NonFiniteError: the matrix has NaN or Inf.
        """


class CpuEncoder:
    """An encoder on the calling thread."""

    def encode(
        self, matrix: npt.NDArray[np.generic], dtype: DTypeName, codes: Bytes, scales: Bytes
    ) -> None:
        """Encode a matrix, see `Encoder.encode`."""
        _core.quantize(matrix, dtype, codes, scales, 1)


CPU = CpuEncoder()


class CudaEncoder:
    """An encoder on a CUDA device, with pinned memory and a stream per calling thread.

    Args:
        device: its index.
    """

    def __init__(self, device: int) -> None:
        self._device = device
        self._of_thread = threading.local()

    def encode(
        self, matrix: npt.NDArray[np.generic], dtype: DTypeName, codes: Bytes, scales: Bytes
    ) -> None:
        """Encode a matrix, see `Encoder.encode`."""
        if not hasattr(self._of_thread, "staged"):
            self._of_thread.staged = _core.StagedQuantizer(self._device)
        self._of_thread.staged.quantize(matrix, dtype, codes, scales)

    def warm_up(self) -> None:
        """Start the first use of the device, which takes half a second, on a thread of its own.

        An error there occurs again when the device is needed.
        """

        def use() -> None:
            with contextlib.suppress(Error):
                _core.StagedQuantizer(self._device)

        with contextlib.suppress(RuntimeError):  # no more threads: then the first job waits
            threading.Thread(target=use).start()
