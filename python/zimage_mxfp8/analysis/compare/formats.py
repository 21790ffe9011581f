"""Other number formats for weights, for measuring only: the error of each on given rows.

Element types are those of the ml_dtypes package, which gives their sizes and limits; scales follow

- OCP Microscaling Formats (MX) Specification v1.0: one E8M0 scale for 32 elements. The
  specification derives it from the largest power of two of the element type ("floor" here);
  "round-up" is the smallest power of two with which nothing saturates, as this package encodes.
- NVFP4: one E4M3 scale for 16 elements, times a float32 scale amax / (448 * 6) for the tensor.
- FP8 and INT8 with a float32 scale amax / 448 or amax / 127 per row or per tensor.

Everything is rounded to nearest, ties to even, and saturates.

Rows are processed as columns of blocks: an array [32, blocks] with its first axis inside a block.
All loops then run over adjacent memory, which makes NumPy eight times as fast as a loop per block.
For the same reason the rounding is arithmetic: ml_dtypes' own casts give the same numbers (the
tests compare them) at an eighth of the speed. Operations reuse memory, because the system takes
longer to give fresh memory than an operation takes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ...system.optional_packages import missing, needed

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Exponents = npt.NDArray[np.int32]
Rounding = Callable[[Floats, Floats, Floats], None]  # values, out, scratch

BLOCK: Final = 32
_WHAT: Final = "comparing formats"  # in the sentence about a missing package
_NVFP4_BLOCK: Final = 16
_INT8_MAX: Final = 127.0
_E8M0_BIAS: Final = 127
_FLOAT32_BITS: Final = 32
# Of the rows processed at once: few enough to stay in the cache, and enough that threads seldom
# wait for one another between operations, where Python lets only one of them run.
_CACHED_ELEMENTS: Final = 1 << 18


@dataclass(frozen=True)
class Element:
    """A floating-point element type.

    Attributes:
        mantissa_bits: explicit bits of the mantissa.
        min_exponent: exponent of the smallest normal number.
        max_exponent: exponent of the largest number.
        maximum: the largest number.
    """

    mantissa_bits: int
    min_exponent: int
    max_exponent: int
    maximum: float

    def round(self, values: Floats, out: Floats, scratch: Floats) -> None:
        """Write to `out` the nearest values of this type, ties to even, saturating.

        Args:
            values: contiguous, any shape.
            out: contiguous, of the same shape.
            scratch: contiguous, of the same shape; its content is lost.
        """
        np.clip(values, np.float32(-self.maximum), np.float32(self.maximum), out=out)
        # The power of two at or below each value; adding it 1.5 * 2^(23 - m) times and taking it
        # away leaves m bits of mantissa, because float32 has 23 and rounds to nearest even.
        np.bitwise_and(out.view(np.uint32), np.uint32(0x7F800000), out=scratch.view(np.uint32))
        np.maximum(scratch, np.float32(2.0**self.min_exponent), out=scratch)
        scratch *= np.float32(1.5 * 2.0 ** (23 - self.mantissa_bits))
        out += scratch
        out -= scratch


@functools.cache
def element(name: str) -> Element:
    """Return an element type of ml_dtypes by its name there.

    Raises:
        MissingExtraError: ml_dtypes is not installed, or too old.
    """
    with needed("analysis", _WHAT):
        import ml_dtypes
    finfo: Any = ml_dtypes.finfo  # which has no types
    try:
        info = finfo(getattr(ml_dtypes, name))
    except AttributeError:
        raise missing("analysis", _WHAT, "ml-dtypes 0.5 or newer") from None
    maximum = float(info.max)
    return Element(int(info.nmant), int(info.minexp), math.frexp(maximum)[1] - 1, maximum)


E4M3, E5M2, E2M1 = "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn"


@dataclass(frozen=True)
class Format:
    """A way to store a matrix.

    Attributes:
        name: short name, in options, CSV and JSON.
        title: the name in tables and pages.
        element_bits: bits of an element.
        scale_bits: bits of a scale, and of everything else that is stored with it.
        block: elements of a row that share a scale; 0 for the whole row, -1 for the whole matrix.
        tensor_bits: bits stored once for the matrix.
    """

    name: str
    title: str
    element_bits: int
    scale_bits: int
    block: int
    tensor_bits: int = 0

    def bits(self, shape: tuple[int, int]) -> int:
        """Bits of a matrix [N, K] with its scales, without padding."""
        rows, cols = shape
        scales = 1 if self.block < 0 else rows
        if self.block > 0:
            scales = rows * -(-cols // self.block)
        return rows * cols * self.element_bits + scales * self.scale_bits + self.tensor_bits


def _mx(name: str, title: str, bits: int, *rules: str) -> list[Format]:
    titles = {
        "": "round-up scales",
        "-floor": "OCP floor scales",
        "-search": "best scale per block",
    }
    return [Format(name + rule, f"{title}, {titles[rule]}", bits, 8, BLOCK) for rule in rules]


FORMATS: Final[dict[str, Format]] = {
    kind.name: kind
    for kind in (
        *_mx("mxfp8-e4m3", "MXFP8 E4M3", 8, "", "-floor", "-search"),
        *_mx("mxfp8-e5m2", "MXFP8 E5M2", 8, "", "-floor", "-search"),
        Format("mxfp8-best", "MXFP8, E4M3 or E5M2 per block", 8, 8 + 1, BLOCK),
        Format("fp8-tensor", "FP8 E4M3, one scale per tensor", 8, _FLOAT32_BITS, -1),
        Format("fp8-row", "FP8 E4M3, one scale per row", 8, _FLOAT32_BITS, 0),
        Format("int8-row", "INT8, one scale per row", 8, _FLOAT32_BITS, 0),
        *_mx("mxfp4", "MXFP4 E2M1", 4, "", "-floor", "-search"),
        Format("nvfp4", "NVFP4", 4, 8, _NVFP4_BLOCK, _FLOAT32_BITS),
    )
}
# The formats that low-rank branches are measured with: one rule of scales per element type and
# layout.
BASE_FORMATS: Final = (
    "mxfp8-e4m3",
    "mxfp8-e5m2",
    "fp8-tensor",
    "fp8-row",
    "int8-row",
    "mxfp4",
    "nvfp4",
)
_MX_ELEMENTS: Final = {"mxfp8-e4m3": E4M3, "mxfp8-e5m2": E5M2, "mxfp4": E2M1}


def measure(matrix: Floats, largest: float) -> dict[str, float]:
    """Return the squared error of each format on some rows of a matrix.

    Args:
        matrix: [rows, K], finite.
        largest: largest magnitude of the whole matrix that the rows are from.

    Returns:
        Format name -> sum of (w - wq)^2, for every one of `FORMATS`.
    """
    errors = dict.fromkeys(FORMATS, 0.0)
    for _, blocks in _cached(matrix, largest):
        for name, error in _measure_blocks(blocks).items():
            errors[name] += error
    return errors


def measure_base(matrix: Floats, largest: float) -> dict[str, float]:
    """Return the same as `measure`, for `BASE_FORMATS` only, in two thirds of the time."""
    errors = dict.fromkeys(BASE_FORMATS, 0.0)
    for _, blocks in _cached(matrix, largest):
        for name in BASE_FORMATS:
            errors[name] += float(blocks.squares(*blocks.encode(name)).sum())
    return errors


def residual(matrix: Floats, name: str, largest: float, out: Floats) -> float:
    """Write w - wq of some rows to `out`, [rows, K], and return the sum of its squares.

    Args:
        matrix: [rows, K], finite.
        name: one of `BASE_FORMATS`.
        largest: largest magnitude of the whole matrix that the rows are from.
        out: like `matrix`.
    """
    total = 0.0
    for rows, blocks in _cached(matrix, largest):
        scales, error = blocks.encode(name)
        total += float(blocks.squares(scales, error).sum())
        error *= -scales
        blocks.rows_of(error, out[rows])
    return total


def _cached(matrix: Floats, largest: float) -> Iterator[tuple[slice, _Blocks]]:
    """Yield a matrix in groups of rows, each as blocks that last until the next group's."""
    rows, cols = matrix.shape
    step = min(max(_CACHED_ELEMENTS // max(cols, 1), 1), rows)
    blocks = _Blocks(step, cols, largest)
    for begin in range(0, rows, step):
        group = slice(begin, min(begin + step, rows))
        blocks.load(matrix[group])
        yield group, blocks


class _Blocks:
    """Rows as columns of blocks, [32, rows * blocks of a row], zero padded.

    Args:
        rows: number of rows that it has memory for.
        cols: number of columns.
        largest: largest magnitude of the whole matrix that the rows are from.
    """

    def __init__(self, rows: int, cols: int, largest: float) -> None:
        self._cols = cols
        self._largest = largest
        self._blocks_per_row = -(-cols // BLOCK)
        self._memory = np.empty((4, BLOCK * rows * self._blocks_per_row), np.float32)

    def load(self, matrix: Floats) -> None:
        """Replace the rows by those of another matrix."""
        rows, cols = matrix.shape
        size = rows * self._blocks_per_row * BLOCK
        self._values, self._scaled, self._error, self._scratch = (
            memory[:size].reshape(BLOCK, -1) for memory in self._memory
        )
        if cols % BLOCK:
            padded = self._scratch.reshape(rows, -1)
            padded[:, :cols] = matrix
            padded[:, cols:] = 0
            matrix = padded
        self._values[:] = matrix.reshape(-1, BLOCK).T
        magnitudes = np.abs(self._values, out=self._scratch)
        self._half_largest = magnitudes.reshape(2, _NVFP4_BLOCK, -1).max(axis=1)
        self._block_largest = self._half_largest.max(axis=0)
        self._row_largest = self._block_largest.reshape(rows, -1).max(axis=1)

    def rows_of(self, columns: Floats, out: Floats) -> None:
        """Write columns of blocks as rows again."""
        rows = self._scratch.reshape(-1, BLOCK)
        rows[:] = columns.reshape(BLOCK, -1).T
        out[:] = rows.reshape(out.shape[0], -1)[:, : self._cols]

    def encode(self, name: str) -> tuple[Floats, Floats]:
        """Encode in one of `BASE_FORMATS`.

        Returns:
            Scales and (wq - w) / scale: [1, columns] and [32, columns], for NVFP4 [2, 1, columns]
            and [2, 16, columns]. The latter lasts until the next call.
        """
        if name in _MX_ELEMENTS:
            return self.encode_mx(_MX_ELEMENTS[name], self.round_up_exponents(_MX_ELEMENTS[name]))
        if name == "nvfp4":
            scales = self._nvfp4_scales()
            values = self._values.reshape(2, _NVFP4_BLOCK, -1)
            return scales, self._encode(values, scales, element(E2M1).round)
        if name == "int8-row":
            scales = self._row_scales(_INT8_MAX)
            return scales, self._encode(self._values, scales, _round_int8)
        fp8 = element(E4M3)
        scales = (
            self._row_scales(fp8.maximum)
            if name == "fp8-row"
            else _nonzero(np.full((1, 1), self._largest / fp8.maximum, np.float32))
        )
        return scales, self._encode(self._values, scales, fp8.round)

    def encode_mx(self, name: str, exponents: Exponents) -> tuple[Floats, Floats]:
        """Encode in an MX format with scales that are powers of two with these exponents."""
        scales = np.ldexp(np.float32(1), exponents)[np.newaxis]
        return scales, self._encode(self._values, scales, element(name).round)

    def _encode(self, values: Floats, scales: Floats, rounding: Rounding) -> Floats:
        """Return (wq - w) / scale, which float32 holds exactly if the scale is a power of two."""
        scaled, error, scratch = (
            memory.reshape(values.shape) for memory in (self._scaled, self._error, self._scratch)
        )
        np.divide(values, scales, out=scaled)
        rounding(scaled, error, scratch)
        error -= scaled
        return error

    def squares(self, scales: Floats, error: Floats) -> Doubles:
        """Return the sum of (w - wq)^2 of each column, [columns] or [2, columns] (NVFP4).

        Sums within a block are float32, which takes a third of the time and adds a relative error
        of about 1e-7.
        """
        sums: Doubles = np.einsum("...ij,...ij->...j", error, error).astype(np.float64)
        sums *= np.square(scales[..., 0, :], dtype=np.float64)
        return sums

    def floor_exponents(self, name: str) -> Exponents:
        """Return the exponents of the OCP rule: largest magnitude's less largest element's."""
        _, exponents = np.frexp(self._block_largest)
        return _e8m0(exponents - 1 - element(name).max_exponent)

    def round_up_exponents(self, name: str) -> Exponents:
        """Return exponents ceil(log2(largest magnitude / largest element)): nothing saturates."""
        kind = element(name)
        mantissas, exponents = np.frexp(self._block_largest)  # mantissas in [0.5, 1)
        saturates = mantissas * 2 > kind.maximum / 2.0**kind.max_exponent
        return _e8m0(exponents - 1 - kind.max_exponent + saturates)

    def _row_scales(self, maximum: float) -> Floats:
        scales = self._row_largest / np.float32(maximum)
        return np.repeat(_nonzero(scales), self._blocks_per_row)[np.newaxis]

    def _nvfp4_scales(self) -> Floats:
        scale_type, kind = element(E4M3), element(E2M1)
        tensor = np.float32(self._largest / (scale_type.maximum * kind.maximum)) or np.float32(1)
        wanted = self._half_largest / np.float32(kind.maximum) / tensor
        scales = np.empty_like(wanted)
        scale_type.round(wanted, scales, np.empty_like(wanted))
        return (_nonzero(scales) * tensor)[:, np.newaxis]


def _nonzero(scales: Floats) -> Floats:
    """Replace scales of 0 by 1: only blocks with codes of 0 have them, with either scale."""
    scales[scales == 0] = 1
    return scales


def _e8m0(exponents: npt.NDArray[Any]) -> Exponents:
    clamped: Exponents = np.clip(exponents, -_E8M0_BIAS, _E8M0_BIAS).astype(np.int32)
    return clamped


def _round_int8(values: Floats, out: Floats, _: Floats) -> None:
    np.rint(values, out=out)
    np.clip(out, np.float32(-_INT8_MAX), np.float32(_INT8_MAX), out=out)


def _measure_blocks(blocks: _Blocks) -> dict[str, float]:
    columns: dict[str, Doubles] = {}
    for name, kind in _MX_ELEMENTS.items():
        exponents = blocks.round_up_exponents(kind)
        smaller = _e8m0(exponents - 1)
        columns[name] = blocks.squares(*blocks.encode_mx(kind, exponents))
        below = blocks.squares(*blocks.encode_mx(kind, smaller))
        # The floor rule gives the round-up scale or half of it.
        is_smaller = blocks.floor_exponents(kind) < exponents
        columns[f"{name}-floor"] = np.where(is_smaller, below, columns[name])
        # No other scale can be best. A larger one gives every element the same or a coarser grid.
        # With a quarter or less, the largest element alone loses more by saturating than all others
        # gain, because only subnormal elements gain and their error is bounded.
        columns[f"{name}-search"] = np.minimum(below, columns[name])
    columns["mxfp8-best"] = np.minimum(columns["mxfp8-e4m3"], columns["mxfp8-e5m2"])
    for name in BASE_FORMATS:
        if name not in columns:
            columns[name] = blocks.squares(*blocks.encode(name))
    return {name: float(sums.sum()) for name, sums in columns.items()}
