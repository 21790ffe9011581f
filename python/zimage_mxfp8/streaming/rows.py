"""Row ranges of matrices, read from files and encoded."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from .. import _core
from ..checkpoint.quantized_layers import QuantizedLayer, damaged
from ..checkpoint.source import SourceTensor
from ..conversion.nonfinite import nonfinite_error
from ..dtypes import FLOAT_NAMES, DTypeName, as_integers
from ..errors import CheckpointError, InvalidArgumentError, NonFiniteError
from .encoder import Encoder
from .error_stats import ErrorStats
from .formats import FORMATS, format_of
from .formats.weight_format import WeightFormat
from .worker import Worker

Bytes = npt.NDArray[np.uint8]
_MXFP8 = FORMATS["mxfp8"]


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
    form: WeightFormat = _MXFP8,
    encoder: Encoder | None = None,
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
        form: the format.
        encoder: where they are encoded; by default on the CPU.
        nonfinite_hint: hint of the error about NaN and Inf.

    Returns the source's bytes, the codes and the scales, all in the worker's scratch memory.

    Raises:
        NonFiniteError: NaN or Inf; row and column are those of the whole tensor.
    """
    shape = end - begin, tensor.shape[1]
    data, matrix, dtype = read_rows(worker, tensor, begin, end, source_rounding)
    codes = worker.scratch.take("codes", form.codes(shape).nbytes, positions[0])
    scales = worker.scratch.take("scales", form.scales(shape).nbytes, positions[1])
    try:
        (encoder or form.encoder()).encode(matrix, dtype, codes, scales)
    except NonFiniteError as error:
        raise nonfinite_error(tensor, begin + error.row, error.column, nonfinite_hint) from None
    except InvalidArgumentError as error:
        raise not_encoded(tensor, form, error) from None
    return data, codes, scales


def measure_rows(
    tensor: SourceTensor,
    data: Bytes,
    rows: int,
    codes: Bytes,
    scales: Bytes,
    form: WeightFormat = _MXFP8,
) -> ErrorStats:
    """Return error statistics of encoded rows; arguments as `encode_rows` gives them."""
    matrix = as_matrix(tensor, data, rows)
    return form.measure(matrix, FLOAT_NAMES[tensor.dtype], codes, scales)


def read_encoded(
    worker: Worker, layer: QuantizedLayer, begin: int, end: int
) -> tuple[Bytes, Bytes]:
    """Read codes and scales of the rows [begin, end), with padding; `begin` is 128 * n."""
    code_row, scale_row = (x.nbytes // x.shape[0] for x in (layer.weight, layer.scale))
    codes = worker.read(layer.weight, begin * code_row, (end - begin) * code_row, "file codes")
    count = format_of(layer).scales((end - begin, layer.shape[1])).nbytes
    return codes, worker.read(layer.scale, begin * scale_row, count, "file scales")


def not_encoded(tensor: SourceTensor, form: WeightFormat, error: Exception) -> CheckpointError:
    """Return the error for a tensor with numbers that a format cannot encode."""
    return CheckpointError(
        f'{tensor.segments[0].path}: "{tensor.name}" cannot be encoded in {form.title}: {error}',
        "exclude the layer, or choose another format",
    )


def check_encoded(layer: QuantizedLayer, codes: Bytes, scales: Bytes) -> None:
    """Check codes and scales of some rows of a layer, or either alone with the other empty.

    Raises:
        CheckpointError: some are damaged, so that they stand for no weights; it names the layer.
    """
    form = format_of(layer)
    counts = form.damaged_codes(codes) | form.damaged_scales(scales)
    if problem := next((what for what, count in counts.items() if count), None):
        raise damaged(layer.weight.segments[0].path, [layer.name], f"it {problem}")


def decode_rows(
    worker: Worker, source: SourceTensor | QuantizedLayer, begin: int, end: int, use: str
) -> npt.NDArray[np.float32]:
    """Read rows [begin, end) of a weight, decoded where it is quantised; `begin` is 128 * n.

    Args:
        worker: reads, and holds the result.
        source: a quantised layer, or a tensor in BF16, F16 or F32.
        begin: first row.
        end: one past the last row.
        use: name of the scratch memory that the result is in.

    Returns:
        float32 [end - begin, K].
    """
    shape = end - begin, source.shape[1]
    memory = worker.scratch.take(use, math.prod(shape) * 4)
    decoded = memory.view(np.float32).reshape(shape)
    if isinstance(source, QuantizedLayer):
        form = format_of(source)
        stored = form.codes(shape).shape[0]  # with padding
        codes, scales = read_encoded(worker, source, begin, begin + stored)
        form.decode(codes, scales, decoded, "float32")
    else:
        _, matrix, dtype = read_rows(worker, source, begin, end, False)
        _core.cast(matrix, dtype, decoded, "float32", 1)
    return decoded
