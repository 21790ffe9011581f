"""How far the weights of two transformers are apart, layer by layer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...checkpoint.quantization import WEIGHT_SUFFIX
from ...checkpoint.quantized_layers import QuantizedLayer
from ...checkpoint.source import SourceTensor
from ...dtypes import FLOAT_NAMES
from ...layout import SCALE_TILE_ROWS
from ...streaming.error_stats import sum_of_squares
from ...streaming.formats import format_of
from ...streaming.jobs import Job, ProgressCallback, run_jobs
from ...streaming.rows import decode_rows
from ...streaming.worker import Worker
from ...text import natural_order
from ...transformer.model_file import ModelFile
from ...zimage.config import ZImageConfig

_CHUNK = 1 << 21  # elements that a job decodes, of A and of B


@dataclass(frozen=True)
class LayerDifference:
    """A weight matrix in A and in B.

    Attributes:
        name: of the weight, without prefix.
        shape: [N, K] in A; in B, if A does not have it.
        a_format: what A stores it in: a dtype, such as BF16, or the title of a format, such as
            MXFP8; None if A does not have it.
        b_format: likewise.
        a_nbytes: bytes of A's weight and its scales.
        squared_error: sum of (a - b)^2; None if a file lacks it, or the shapes differ.
        squared_signal: sum of b^2; 0 without an error.
    """

    name: str
    shape: tuple[int, int]
    a_format: str | None
    b_format: str | None
    a_nbytes: int
    squared_error: float | None
    squared_signal: float

    @property
    def is_quantized_in_a(self) -> bool:
        """Whether A has it, and does not store it in a floating dtype."""
        return self.a_format is not None and self.a_format not in FLOAT_NAMES

    @property
    def relative_squared_error(self) -> float | None:
        """Squared error over squared signal; 0 for equal matrices, None without an error."""
        if self.squared_error is None:
            return None
        return _ratio(self.squared_error, self.squared_signal)


@dataclass(frozen=True)
class WeightComparison:
    """The weight matrices of two transformers.

    Attributes:
        layers: in natural order of their names.
        a_bytes: size of A's files.
    """

    layers: tuple[LayerDifference, ...]
    a_bytes: int

    @property
    def relative_squared_error(self) -> float:
        """Squared error over squared signal of all matrices that both have in one shape."""
        errors = [layer.squared_error or 0.0 for layer in self.layers]
        return _ratio(sum(errors), self.squared_signal)

    @property
    def squared_signal(self) -> float:
        """Sum of b^2 over all matrices that both have in one shape."""
        return sum(layer.squared_signal for layer in self.layers)

    @property
    def worst(self) -> LayerDifference | None:
        """The matrix with the largest relative squared error; None if none can be compared."""
        compared = [layer for layer in self.layers if layer.squared_error is not None]

        def error(layer: LayerDifference) -> float:
            found = layer.relative_squared_error or 0.0
            return math.inf if math.isnan(found) else found

        return max(compared, key=error, default=None)

    def above(self, limit: float) -> int:
        """Return how many matrices have a relative squared error above a limit, or NaN."""
        errors = [layer.relative_squared_error for layer in self.layers]
        return sum(error is not None and not error <= limit for error in errors)

    @property
    def not_comparable(self) -> tuple[LayerDifference, ...]:
        """The matrices that a file lacks, or has in another shape."""
        return tuple(layer for layer in self.layers if layer.squared_error is None)

    @property
    def are_equal(self) -> bool:
        """Whether all matrices of A and B have the same values."""
        return all(layer.squared_error == 0 for layer in self.layers)

    @property
    def formats(self) -> tuple[Counter[str], Counter[str]]:
        """How many matrices A, and B, stores in each format."""
        stored = ((layer.a_format, layer.b_format) for layer in self.layers)
        a, b = zip(*stored, strict=True)
        return Counter(filter(None, a)), Counter(filter(None, b))

    def to_dict(self) -> dict[str, Any]:
        """As JSON-compatible values."""
        return {
            "relative_squared_error": self.relative_squared_error,
            "equal": self.are_equal,
            "worst": None if self.worst is None else self.worst.name,
            "not_comparable": [layer.name for layer in self.not_comparable],
            "layers": [
                {
                    "name": layer.name,
                    "shape": list(layer.shape),
                    "a": layer.a_format,
                    "b": layer.b_format,
                    "relative_squared_error": layer.relative_squared_error,
                }
                for layer in self.layers
            ],
        }


def compare_weights(
    a: ModelFile[ZImageConfig],
    b: ModelFile[ZImageConfig],
    progress: ProgressCallback | None = None,
) -> WeightComparison:
    """Read both files once, decode every weight matrix and compare it with its counterpart.

    Memory is bounded: chunks of rows on all cores, 16 MiB of numbers for each.

    Args:
        a: the transformer that is judged.
        b: the one that it is compared with.
        progress: called with the bytes of both files that are read.

    Raises:
        CheckpointError: a file cannot be read.
    """
    of_a, of_b = _matrices(a), _matrices(b)
    # Added to by all workers, by name and first row.
    sums: dict[tuple[str, int], tuple[float, float]] = {}
    common = [name for name in of_a if name in of_b and of_a[name].shape == of_b[name].shape]
    jobs = [job for name in common for job in _jobs(name, of_a[name], of_b[name], sums)]
    run_jobs(jobs, None, progress=progress)
    totals: dict[str, tuple[float, float]] = {}
    for name, row in sorted(sums):  # in one order, for one result
        error, signal = totals.get(name, (0.0, 0.0))
        more_error, more_signal = sums[name, row]
        totals[name] = error + more_error, signal + more_signal
    layers = (
        _difference(name, of_a.get(name), of_b.get(name), totals.get(name))
        for name in sorted(of_a.keys() | of_b.keys(), key=natural_order)
    )
    a_bytes = sum(file.stat().st_size for file in a.checkpoint.files)
    return WeightComparison(tuple(layers), a_bytes)


def _matrices(model: ModelFile[ZImageConfig]) -> dict[str, SourceTensor | QuantizedLayer]:
    """Return a model's weight matrices by name."""
    found: dict[str, SourceTensor | QuantizedLayer] = {
        name: tensor
        for name, tensor in model.tensors.items()
        if name.endswith(WEIGHT_SUFFIX) and len(tensor.shape) == 2
    }
    return found | {name + WEIGHT_SUFFIX: layer for name, layer in model.layers.items()}


def _jobs(
    name: str,
    a: SourceTensor | QuantizedLayer,
    b: SourceTensor | QuantizedLayer,
    sums: dict[tuple[str, int], tuple[float, float]],
) -> Sequence[Job]:
    rows, columns = a.shape
    step = max(_CHUNK // (columns * SCALE_TILE_ROWS), 1) * SCALE_TILE_ROWS

    def job(begin: int, end: int) -> Job:
        def run(worker: Worker) -> None:
            found = decode_rows(worker, a, begin, end, "a")
            wanted = decode_rows(worker, b, begin, end, "b")
            signal = _squares(wanted)
            with np.errstate(over="ignore"):  # then the error is infinite
                np.subtract(found, wanted, out=found)
            sums[name, begin] = _squares(found), signal

        share = (_nbytes(a) + _nbytes(b)) * (end - begin) // rows
        return Job(name, share, run)

    return [job(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


def _squares(values: npt.NDArray[np.float32]) -> float:
    total = sum_of_squares(values)
    if math.isfinite(total):
        return total
    return float(np.square(values, dtype=np.float64).sum())  # some are beyond float32's range


def _nbytes(matrix: SourceTensor | QuantizedLayer) -> int:
    if isinstance(matrix, QuantizedLayer):
        return matrix.weight.nbytes + matrix.scale.nbytes
    return matrix.nbytes


def _difference(
    name: str,
    a: SourceTensor | QuantizedLayer | None,
    b: SourceTensor | QuantizedLayer | None,
    sums: tuple[float, float] | None,
) -> LayerDifference:
    one = a or b
    assert one is not None
    rows, columns = one.shape
    error, signal = sums if sums is not None else (None, 0.0)
    return LayerDifference(
        name,
        (rows, columns),
        _format(a),
        _format(b),
        0 if a is None else _nbytes(a),
        error,
        signal,
    )


def _format(matrix: SourceTensor | QuantizedLayer | None) -> str | None:
    if matrix is None:
        return None
    return format_of(matrix).title if isinstance(matrix, QuantizedLayer) else matrix.dtype


def _ratio(error: float, signal: float) -> float:
    """Return an error relative to a signal; without a signal, relative to nothing: 0 or 1."""
    if signal:
        return error / signal
    return 1.0 if error else 0.0
