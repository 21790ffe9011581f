"""The formats in which `export` encodes layers anew: row-wise FP8 and INT8 ConvRot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

from .. import _core
from ..checkpoint import quantization as markers
from ..checkpoint.quantized_layers import QuantizedLayer, damaged
from ..errors import InvalidArgumentError, PrecisionLossError
from ..layout import SCALE_TILE_ROWS
from ..streaming.formats import FORMATS, format_of
from ..streaming.jobs import Job, row_chunks
from ..streaming.rows import check_encoded, not_encoded, read_encoded
from ..streaming.worker import Worker

Encoding = Literal["fp8-rowwise", "int8-convrot"]

_DECODED = 1 << 21  # elements that are decoded at once
_FOLD_BOUND = 1e-3  # the largest relative error that folding may add to some rows of a layer
_INT8 = FORMATS["int8-convrot"]


@dataclass(frozen=True)
class EncodedFormat:
    """A format in which all layers are encoded anew.

    Attributes:
        marker: returns the description of a layer [N, K].
        codes: returns dtype and shape of the codes of a layer [N, K].
        scales: the same for the scales.
        jobs: returns the jobs that encode a layer, given the places of its codes and scales.
    """

    marker: Callable[..., dict[str, Any]]
    codes: Callable[[tuple[int, int]], tuple[str, tuple[int, ...]]]
    scales: Callable[[tuple[int, int]], tuple[str, tuple[int, ...]]]
    jobs: Callable[[QuantizedLayer, int, int], list[Job]]


def _fold_jobs(layer: QuantizedLayer, codes_begin: int, scales_begin: int) -> list[Job]:
    """Return the jobs that fold a layer and write codes [N, K] and float32 scales [N]."""
    rows, columns = layer.shape

    def job(begin: int, end: int) -> Job:
        def run(worker: Worker) -> None:
            codes, scales = read_encoded(worker, layer, begin, end)
            real = min(end, rows) - begin
            at = codes_begin + begin * columns, scales_begin + begin * 4
            folded = worker.scratch.take("folded codes", real * columns, at[0])
            row_scales = np.empty(real, np.float32)
            matrix = codes.reshape(end - begin, -1), scales.reshape(-1, layer.scale.shape[1])
            target = folded.reshape(real, columns)
            try:
                _core.fold(*matrix, real, columns, target, row_scales, _FOLD_BOUND, 1)
            except PrecisionLossError as error:
                raise PrecisionLossError(
                    f'layer "{layer.name}" cannot be folded: {error.problem}; keep it in BF16 when '
                    "you quantise the original",
                    error.relative_error,
                ) from None
            except InvalidArgumentError as error:  # NaN among the codes or scales
                raise damaged(layer.weight.segments[0].path, [layer.name], error) from None
            worker.write(at[0], folded)
            worker.write(at[1], row_scales)

        return Job(layer.weight.name, (end - begin) * layer.weight.shape[1], run)

    return [job(begin, end) for begin, end in row_chunks(layer.weight)]


def _encode_jobs(layer: QuantizedLayer, codes_begin: int, scales_begin: int) -> list[Job]:
    """Return the jobs that decode an MXFP8 layer, which is exact, and encode it in INT8."""
    rows, columns = layer.shape
    source, encoder = format_of(layer), _INT8.encoder()
    code_row, scale_row = (x(layer.shape).row_nbytes for x in (_INT8.codes, _INT8.scales))
    # Rows that are decoded at once: float32 takes four times the memory of the codes.
    step = max(1, _DECODED // (columns * SCALE_TILE_ROWS)) * SCALE_TILE_ROWS

    def encode(worker: Worker, begin: int, end: int) -> None:
        codes, scales = read_encoded(worker, layer, begin, end)
        check_encoded(layer, codes, scales)
        real = min(end, rows) - begin
        plain = worker.scratch.take("plain", real * columns * 4).view(np.uint32)
        matrix = plain.reshape(real, columns)
        source.decode(codes, scales, matrix, "float32")
        at = codes_begin + begin * code_row, scales_begin + begin * scale_row
        new_codes = worker.scratch.take("codes", real * code_row, at[0])
        new_scales = worker.scratch.take("scales", real * scale_row, at[1])
        try:
            encoder.encode(matrix, "float32", new_codes, new_scales)
        except InvalidArgumentError as error:
            raise not_encoded(layer.weight, _INT8, error) from None
        worker.write(at[0], new_codes)
        worker.write(at[1], new_scales)

    def job(begin: int, end: int) -> Job:
        def run(worker: Worker) -> None:
            for first in range(begin, end, step):
                encode(worker, first, min(first + step, end))

        return Job(layer.weight.name, (end - begin) * layer.weight.shape[1], run)

    return [job(begin, end) for begin, end in row_chunks(layer.weight)]


ENCODED: Final[dict[Encoding, EncodedFormat]] = {
    "fp8-rowwise": EncodedFormat(
        lambda _, **flags: markers.rowwise_marker(**flags),
        lambda shape: ("F8_E4M3", shape),
        lambda shape: ("F32", shape[:1]),
        _fold_jobs,
    ),
    "int8-convrot": EncodedFormat(_INT8.marker, _INT8.codes, _INT8.scales, _encode_jobs),
}
