"""Row ranges of matrices, read from files and encoded."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from .. import _core
from ..checkpoint.mxfp8_layers import MXFP8Layer
from ..checkpoint.source import SourceTensor
from ..conversion.nonfinite import nonfinite_error
from ..dtypes import FLOAT_NAMES, DTypeName, as_integers
from ..errors import NonFiniteError
from ..layout import padded_shape, scale_shape
from .encoder import CPU, Encoder
from .error_stats import ErrorStats
from .worker import Worker

Bytes = npt.NDArray[np.uint8]


def as_matrix(tensor: SourceTensor, data: Bytes, rows: int) -> npt.NDArray[np.generic]:
    """View the bytes of `rows` rows of a matrix as 2- or 4-byte integers for the core."""
    return as_integers(tensor.dtype, data).reshape(rows, tensor.shape[1])


def round_to_bfloat16(
    worker: Worker, matrix: npt.NDArray[np.generic], dtype: DTypeName
) -> tuple[npt.NDArray[np.generic], DTypeName]:
    """Return a matrix as BF16 bits, in the worker's scratch memory if it has another type."""
    if dtype == "bfloat16":
        return matrix, dtype
    rounded = worker.scratch.take("rounded", matrix.size * 2).view(np.uint16).reshape(matrix.shape)
    _core.cast(matrix, dtype, rounded, "bfloat16", 1)
    return rounded, "bfloat16"


def read_rows(
    worker: Worker, tensor: SourceTensor, begin: int, end: int, source_rounding: bool
) -> tuple[Bytes, npt.NDArray[np.generic], DTypeName]:
    """Read rows [begin, end) of a weight: the bytes, and a matrix of them for the core.

    With `source_rounding` the matrix is rounded to BF16, the bytes are not.
    """
    row_bytes = tensor.nbytes // tensor.shape[0]
    data = worker.read(tensor, begin * row_bytes, (end - begin) * row_bytes)
    matrix, dtype = as_matrix(tensor, data, end - begin), FLOAT_NAMES[tensor.dtype]
    if source_rounding:
        matrix, dtype = round_to_bfloat16(worker, matrix, dtype)
    return data, matrix, dtype


def encode_rows(
    worker: Worker,
    tensor: SourceTensor,
    begin: int,
    end: int,
    source_rounding: bool,
    positions: tuple[int, int] = (0, 0),
    *,
    encoder: Encoder = CPU,
    nonfinite_hint: str = "",
) -> tuple[Bytes, Bytes, Bytes]:
    """Read rows [begin, end) of a weight and encode them.

    Args:
        worker: reads, and holds the results.
        tensor: the weight.
        begin: first row, a multiple of 128.
        end: one past the last row.
        source_rounding: whether the weight is rounded to BF16 first.
        positions: where codes and scales will be written.
        encoder: where they are encoded.
        nonfinite_hint: hint of the error about NaN and Inf.

    Returns the source's bytes, the codes [padded rows, padded columns] and the blocked scales, all
    in the worker's scratch memory.

    Raises:
        NonFiniteError: NaN or Inf; row and column are those of the whole tensor.
    """
    rows, cols = end - begin, tensor.shape[1]
    data, matrix, dtype = read_rows(worker, tensor, begin, end, source_rounding)
    codes = worker.scratch.take("codes", math.prod(padded_shape((rows, cols))), positions[0])
    scales = worker.scratch.take("scales", math.prod(scale_shape((rows, cols))), positions[1])
    try:
        encoder.encode(matrix, dtype, codes, scales)
    except NonFiniteError as error:
        raise nonfinite_error(tensor, begin + error.row, error.column, nonfinite_hint) from None
    return data, codes, scales


def measure_rows(
    tensor: SourceTensor, data: Bytes, rows: int, codes: Bytes, scales: Bytes
) -> ErrorStats:
    """Return error statistics of encoded rows; arguments as `encode_rows` gives them."""
    cols = tensor.shape[1]
    matrix = as_matrix(tensor, data, rows)
    error, signal, worst = _core.measure_residual(
        matrix, FLOAT_NAMES[tensor.dtype], codes, scales, 1
    )
    plain = np.empty((rows, -(-cols // 32)), np.uint8)
    _core.from_blocked(scales, plain)
    histogram = np.bincount(plain.reshape(-1), minlength=256)
    return ErrorStats(error, signal, worst, rows * cols, histogram)


def read_encoded(worker: Worker, layer: MXFP8Layer, begin: int, end: int) -> tuple[Bytes, Bytes]:
    """Read codes and blocked scales of the padded rows [begin, end); `begin` is 128 * n."""
    code_cols, scale_cols = layer.weight.shape[1], layer.scale.shape[1]
    codes = worker.read(layer.weight, begin * code_cols, (end - begin) * code_cols, "file codes")
    scale_rows = -(-(end - begin) // 128) * 128
    scales = worker.read(layer.scale, begin * scale_cols, scale_rows * scale_cols, "file scales")
    return codes, scales


def decode_rows(
    worker: Worker, source: SourceTensor | MXFP8Layer, begin: int, end: int, use: str
) -> npt.NDArray[np.float32]:
    """Read rows [begin, end) of a weight, decoded where it is MXFP8; `begin` is 128 * n.

    Args:
        worker: reads, and holds the result.
        source: an MXFP8 layer, or a tensor in BF16, F16 or F32.
        begin: first row.
        end: one past the last row.
        use: name of the scratch memory that the result is in.

    Returns:
        float32 [end - begin, K].
    """
    shape = end - begin, source.shape[1]
    memory = worker.scratch.take(use, math.prod(shape) * 4)
    decoded = memory.view(np.float32).reshape(shape)
    if isinstance(source, MXFP8Layer):
        rows = padded_shape((end - begin, 1))[0]
        codes, scales = read_encoded(worker, source, begin, begin + rows)
        _core.dequantize(codes, scales, decoded, "float32", 1)
    else:
        _, matrix, dtype = read_rows(worker, source, begin, end, False)
        _core.cast(matrix, dtype, decoded, "float32", 1)
    return decoded
