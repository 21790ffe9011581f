"""The interface of the formats that weights are encoded in."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from ...checkpoint.quantized_layers import QuantizedLayer
from ...dtypes import SAFETENSORS_BITS, DTypeName
from ..encoder import Encoder
from ..error_stats import ErrorStats

Bytes = npt.NDArray[np.uint8]
Matrix = npt.NDArray[np.generic]  # [rows, columns], as integers of the element's width
Counts = dict[str, int]  # a problem, as a clause such as "has NaN codes", and how many there are


class Stored(NamedTuple):
    """A tensor of an encoded matrix in a file.

    Attributes:
        dtype: as safetensors files name it.
        shape: its shape; the first axis is that of the rows.
    """

    dtype: str
    shape: tuple[int, int]

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row."""
        return self.shape[1] * self.item_nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.item_nbytes

    @property
    def item_nbytes(self) -> int:
        """Bytes of one element."""
        return SAFETENSORS_BITS[self.dtype] // 8


@dataclass
class Flaws:
    """What is wrong with the data of encoded rows.

    Attributes:
        breaches: (tensor, problem, number of elements).
        notes: the same of what only some programs read otherwise.
    """

    breaches: list[tuple[str, str, int]]
    notes: list[tuple[str, str, int]]


class WeightFormat(ABC):
    """A format that weights are encoded in.

    Rows are encoded and decoded in multiples of 128, except for the last ones of a matrix. Codes
    and scales are bytes, as they stand in files.

    Attributes:
        name: as an option of `convert` gives it, and at the end of file names.
        title: in sentences.
        can_reproduce_convert_to_quant: whether files can equal convert_to_quant's byte for byte,
            its random bias correction included.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    can_reproduce_convert_to_quant: ClassVar[bool]

    @abstractmethod
    def codes(self, shape: tuple[int, int]) -> Stored:
        """Return how the codes of a matrix [N, K] are stored."""

    @abstractmethod
    def scales(self, shape: tuple[int, int]) -> Stored:
        """Return how the scales of a matrix [N, K] are stored."""

    @abstractmethod
    def marker(self, shape: tuple[int, int], *, full_precision: bool = False) -> dict[str, Any]:
        """Return the description of a layer [N, K], for its `comfy_quant` tensor.

        Args:
            shape: [N, K].
            full_precision: ask readers not to quantise the layer's input.
        """

    @abstractmethod
    def encoder(self, device: str = "cpu") -> Encoder:
        """Return an encoder on a device, given by its name.

        Raises:
            UsageError: not the name of a device, or the format is not encoded on GPUs.
            UnsupportedError: this build has no CUDA, or this machine does not have the device.
        """

    @abstractmethod
    def decode(self, codes: Bytes, scales: Bytes, matrix: Matrix, dtype: DTypeName) -> None:
        """Decode rows into a matrix [rows, K] of a dtype."""

    @abstractmethod
    def damaged_codes(self, codes: Bytes) -> Counts:
        """Return the problems of codes that no sound layer has, whatever its shape."""

    @abstractmethod
    def damaged_scales(self, scales: Bytes) -> Counts:
        """Return the problems of scales that no sound layer has, whatever its shape."""

    @abstractmethod
    def change_times(
        self, matrix: Matrix, dtype: DTypeName, codes: Bytes, scales: Bytes, vector: Any
    ) -> Any:
        """Multiply the change by encoding with a vector.

        Args:
            matrix: the rows before they were encoded, [rows, K].
            dtype: dtype of its elements.
            codes: their codes.
            scales: their scales.
            vector: float64 [K].

        Returns:
            (matrix - decoded) @ vector, float64 [rows].
        """

    @abstractmethod
    def measure(self, matrix: Matrix, dtype: DTypeName, codes: Bytes, scales: Bytes) -> ErrorStats:
        """Return error statistics of encoded rows; arguments as for `change_times`."""

    def flaws(
        self,
        layer: QuantizedLayer,
        codes: Bytes,
        scales: Bytes,
        begin: int,  # noqa: ARG002 - for subclasses
    ) -> Flaws:
        """Return what is wrong with rows of a layer, from row `begin` on."""
        found = (
            (layer.weight.name, self.damaged_codes(codes)),
            (layer.scale.name, self.damaged_scales(scales)),
        )
        return Flaws([(name, *each) for name, counts in found for each in counts.items()], [])

    def misordering(self, expected: Bytes, found: Bytes) -> str | None:  # noqa: ARG002
        """Return the order of a layer's scales, as a clause, if it is a known wrong one.

        Args:
            expected: all its scales.
            found: those in the file.
        """
        return None
