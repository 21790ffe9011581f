"""`compare`: the error of each number format on a checkpoint's weights."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import numpy as np
import numpy.typing as npt

from ... import _core
from ...checkpoint import quantization as markers
from ...checkpoint.identify import open_for
from ...checkpoint.scopes import Scope, group_of
from ...checkpoint.source import Checkpoint, SourceTensor
from ...checks import check_threads, number
from ...checks import path as path_argument
from ...conversion.plan import MAX_COLUMNS
from ...conversion.recipes import compile_pattern
from ...dtypes import FLOAT_NAMES, SAFETENSORS_BITS
from ...errors import CheckpointError, UsageError
from ...printing.progress import compare_bar, shown
from ...streaming.error_stats import ErrorStats, merge_rows
from ...streaming.jobs import Job, Progress, row_chunks, run_jobs
from ...streaming.rows import as_matrix, encode_rows, measure_rows, read_rows
from ...streaming.worker import Worker
from ...text import natural_order
from .formats import E4M3, FORMATS, element, measure
from .low_rank import MAX_ELEMENTS, STEPS, measure_low_rank
from .outputs import CompareOutputs
from .report import (
    MXFP8,
    CompareReport,
    FormatError,
    FormatSize,
    GroupComparison,
    LayerComparison,
    LowRankError,
    combine,
    summarise_low_rank,
)

LowRank = Literal["groups", "all", "none"]
Stage = Literal["reading", "sampling", "low rank"]

DEFAULT_SAMPLE: Final = 1 / 8
DEFAULT_BOUND: Final = 1e-3
_TILE_ROWS: Final = 128  # sampled together
_FEWEST_TILES: Final = 2  # of which a standard error can be computed
# Magnitude of a weight, far beyond any model's; near float32's limit, squares and MXFP8's own
# rounding become infinite.
_LARGEST: Final = 2.0**100


@dataclass(frozen=True)
class CompareProgress(Progress):
    """Progress of the current stage of a comparison.

    Attributes:
        stage: "reading" (every weight in MXFP8), "sampling" (the other formats) or "low rank".
    """

    stage: Stage


CompareCallback = Callable[[CompareProgress], object]


_LEAVE_OUT = "leave it out with `layers`"


@dataclass(frozen=True)
class _Linear:
    """A weight to compare."""

    tensor: SourceTensor
    name: str
    group: str

    @property
    def shape(self) -> tuple[int, int]:
        return self.tensor.shape[0], self.tensor.shape[1]


def compare(
    source: str | os.PathLike[str],
    *,
    any_model: bool = False,
    layers: str | None = None,
    sample: float = DEFAULT_SAMPLE,
    low_rank: LowRank = "groups",
    csv: str | os.PathLike[str] | None = None,
    write_recipe: str | os.PathLike[str] | None = None,
    bound: float = DEFAULT_BOUND,
    overwrite: bool = False,
    threads: int = 0,
    progress: CompareCallback | bool | None = None,
) -> CompareReport:
    """Measure the error of number formats of 8 and 4 bits on a checkpoint's linears.

    Every weight is encoded in MXFP8 by this package's codec. The other formats are measured on a
    sample of rows, evenly spaced tiles of 128 of every matrix, and low-rank branches on all rows of
    one layer for each group. All figures are relative squared errors of weights alone; see
    docs/methodology.md.

    Args:
        source: a ComfyUI single file or a diffusers folder; BF16, F16 or F32 weights.
        any_model: accept a checkpoint that is not Z-Image.
        layers: regular expression, searched in the tensors' full names; other linears are left
            out.
        sample: fraction of the rows, above 0 and up to 1.
        low_rank: measure low-rank branches on one layer for each group, on "all", or on "none".
        csv: file to write every layer's figures to.
        write_recipe: file to write a recipe to that keeps the layers with a relative squared error
            in MXFP8 above `bound`, the embedders and the final layer; needs all layers.
        bound: relative squared error.
        overwrite: replace existing outputs.
        threads: cores to use; 0 means all. NumPy's linear algebra, in the low-rank stage, uses all
            of them, unless OPENBLAS_NUM_THREADS was 1 when NumPy was imported, which the command
            sets. That saves time where other programs use the cores too.
        progress: called with a `CompareProgress` from this thread; True draws bars on a terminal.

    Returns:
        A `CompareReport`.

    Raises:
        UsageError: if options contradict each other, or a pattern matches nothing.
        CheckpointError: the checkpoint is unreadable, malformed, not Z-Image or quantised already.
        NonFiniteError: a weight has NaN or Inf; the sentence names tensor, row and column.
        OutputError: an output cannot be written, or exists already.
        MissingExtraError: the package ml_dtypes is not installed.
    """
    outputs = CompareOutputs(
        csv=None if csv is None else path_argument("csv", csv),
        write_recipe=None if write_recipe is None else path_argument("write_recipe", write_recipe),
        bound=number("bound", bound),
        overwrite=overwrite,
    )
    report = compare_weights(
        source,
        outputs,
        any_model=any_model,
        layers=layers,
        sample=sample,
        low_rank=low_rank,
        threads=threads,
        progress=progress,
    )
    outputs.write(report)
    return report


def compare_weights(
    source: str | os.PathLike[str],
    outputs: CompareOutputs,
    *,
    any_model: bool,
    layers: str | None,
    sample: float,
    low_rank: LowRank,
    threads: int,
    progress: CompareCallback | bool | None,
) -> CompareReport:
    """Do the work of `compare`, and leave it to the caller to write the files.

    Args:
        source: as for `compare`, as are all arguments but the next.
        outputs: the files to write later, which are checked.
        any_model: see `compare`.
        layers: see `compare`.
        sample: see `compare`.
        low_rank: see `compare`.
        threads: see `compare`.
        progress: see `compare`.

    Raises:
        Error: as `compare`.
    """
    started = time.perf_counter()
    sample = number("sample", sample)
    _check_options(sample, low_rank, outputs, layers, threads)
    element(E4M3)  # raises before any work is done
    found = open_for(source, "analyse", any_model=any_model)
    checkpoint, scope = found.checkpoint, found.scope
    outputs.check(checkpoint.inputs)
    linears = _find_linears(checkpoint, scope, layers)

    warnings: list[str] = []
    with shown(progress, compare_bar) as callback:
        measured = _Measurement(checkpoint, linears, sample, threads, callback)
        branches = _low_rank_errors(linears, low_rank, threads, callback, warnings)
    compared = {linear.tensor.name: measured.layer(linear) for linear in linears}
    by_group: dict[str, list[LayerComparison]] = {}
    for layer in compared.values():
        by_group.setdefault(layer.group, []).append(layer)
    groups = [combine(name, members) for name, members in by_group.items()]
    groups.sort(key=lambda group: -group.parameters)
    total = combine("all layers", list(compared.values()))
    report = CompareReport(
        input=str(source),
        layers=list(compared.values()),
        total=total,
        groups=groups,
        sizes=_sizes(checkpoint, scope, linears, total),
        low_rank=branches,
        low_rank_summary=summarise_low_rank(branches, compared, groups),
        sample=sample,
        sampled=sum(layer.sampled_rows * layer.shape[1] for layer in compared.values())
        / total.parameters,
        warnings=warnings,
        seconds=time.perf_counter() - started,
    )
    warnings += outputs.warnings(report)
    return report


def _check_options(
    sample: float, low_rank: str, outputs: CompareOutputs, layers: object, threads: Any
) -> None:
    if not 0 < sample <= 1:
        raise UsageError("sample", "must be above 0 and at most 1")
    if low_rank not in get_args(LowRank):
        raise UsageError("low_rank", f"must be one of {', '.join(get_args(LowRank))}")
    if not 0 <= outputs.bound < math.inf:
        raise UsageError("bound", "must be a relative squared error, 0 or more")
    check_threads(threads)
    if layers is not None and outputs.write_recipe is not None:
        raise UsageError("write_recipe", "needs the errors of all layers", "drop `layers`")


def _find_linears(checkpoint: Checkpoint, scope: Scope, layers: str | None) -> list[_Linear]:
    """Return every weight matrix of the transformer, or those that the pattern finds."""
    try:
        pattern = compile_pattern("" if layers is None else layers)
    except ValueError as error:
        raise UsageError(
            "layers", f'"{layers}" is not a regular expression: {error}', "correct it"
        ) from None
    linears = []
    for name in sorted(checkpoint.tensors, key=natural_order):
        tensor = checkpoint.tensors[name]
        is_matrix = len(tensor.shape) == 2 and tensor.nbytes > 0
        if not (name in scope and name.endswith(markers.WEIGHT_SUFFIX) and is_matrix):
            continue
        if not pattern.search(name):
            continue
        if tensor.shape[1] > MAX_COLUMNS:
            raise CheckpointError(
                f'{checkpoint.path}: tensor "{name}" has {tensor.shape[1]:,} columns; more than '
                f"{MAX_COLUMNS:,} cannot be compared",
                _LEAVE_OUT,
            )
        if tensor.dtype in FLOAT_NAMES:
            linears.append(_Linear(tensor, scope.inner(name), group_of(name, scope)))
        elif tensor.dtype.startswith(("F", "C")):
            raise CheckpointError(
                f'{checkpoint.path}: tensor "{name}" is {tensor.dtype}; only BF16, F16 and F32 '
                "weights can be compared",
                _LEAVE_OUT,
            )
    if not linears and layers is not None:
        raise UsageError(
            "layers", f'"{layers}" finds no weight matrix in {checkpoint.path}', "give another"
        )
    if not linears:
        raise CheckpointError(
            f"{checkpoint.path} has no weight matrices", "name the file of a transformer"
        )
    return linears


def _with_stage(
    progress: CompareCallback | None, stage: Stage
) -> Callable[[Progress], object] | None:
    if progress is None:
        return None
    return lambda state: progress(CompareProgress(state.done, state.total, state.tensor, stage))


class _Measurement:
    """Run the first two stages: MXFP8 on every row, then every format on the sampled rows."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        linears: list[_Linear],
        sample: float,
        threads: int,
        progress: CompareCallback | None,
    ) -> None:
        self._checkpoint = checkpoint
        self._sample = sample
        self._stats: dict[tuple[str, int], ErrorStats] = {}
        self._largest: dict[tuple[str, int], float] = {}
        self._tiles: dict[tuple[str, int], dict[str, float]] = {}
        jobs = [
            self._reading_job(linear.tensor, begin, end)
            for linear in linears
            for begin, end in row_chunks(linear.tensor)
        ]
        run_jobs(jobs, None, threads=threads, progress=_with_stage(progress, "reading"))
        self._exact = merge_rows(self._stats)
        self._largest_of = {
            linear.tensor.name: max(
                self._largest[linear.tensor.name, begin] for begin, _ in row_chunks(linear.tensor)
            )
            for linear in linears
        }
        for name, largest in self._largest_of.items():
            if largest > _LARGEST:
                raise CheckpointError(
                    f'{checkpoint.path}: tensor "{name}" has weights of up to {largest:.2g}; more '
                    f"than {_LARGEST:.2g} cannot be compared",
                    _LEAVE_OUT,
                )
        jobs = [
            self._sampling_job(linear.tensor, tile)
            for linear in linears
            for tile in self._sampled_tiles(linear.tensor)
        ]
        run_jobs(jobs, None, threads=threads, progress=_with_stage(progress, "sampling"))

    def _reading_job(self, tensor: SourceTensor, begin: int, end: int) -> Job:
        def run(worker: Worker) -> None:
            data, codes, scales = encode_rows(
                worker, tensor, begin, end, False, nonfinite_hint=_LEAVE_OUT
            )
            self._stats[tensor.name, begin] = measure_rows(tensor, data, end - begin, codes, scales)
            self._largest[tensor.name, begin] = _largest_magnitude(tensor, data, end - begin)

        return Job(tensor.name, (end - begin) * (tensor.nbytes // tensor.shape[0]), run)

    def _sampled_tiles(self, tensor: SourceTensor) -> list[int]:
        """Return the numbers of the sampled tiles of a matrix, evenly spaced."""
        tiles = -(-tensor.shape[0] // _TILE_ROWS)
        count = min(max(math.ceil(tiles * self._sample), _FEWEST_TILES), tiles)
        return [(2 * i + 1) * tiles // (2 * count) for i in range(count)]

    def _tile_rows(self, tensor: SourceTensor, tile: int) -> tuple[int, int]:
        return tile * _TILE_ROWS, min((tile + 1) * _TILE_ROWS, tensor.shape[0])

    def _sampling_job(self, tensor: SourceTensor, tile: int) -> Job:
        begin, end = self._tile_rows(tensor, tile)

        def run(worker: Worker) -> None:
            _, matrix, dtype = read_rows(worker, tensor, begin, end, False)
            rows = np.empty(matrix.shape, np.float32)
            _core.cast(matrix, dtype, rows, "float32", 1)
            errors = measure(rows, self._largest_of[tensor.name])
            self._tiles[tensor.name, tile] = errors | {"signal": _squares(rows)}

        return Job(tensor.name, (end - begin) * (tensor.nbytes // tensor.shape[0]), run)

    def layer(self, linear: _Linear) -> LayerComparison:
        """Return the results for one layer."""
        tensor = linear.tensor
        exact = self._exact[tensor.name]
        tiles = self._sampled_tiles(tensor)
        found = [self._tiles[tensor.name, tile] for tile in tiles]
        everything = -(-tensor.shape[0] // _TILE_ROWS)
        # MXFP8's error is known for all rows; another format's error is estimated from its ratio to
        # MXFP8's on the sampled rows. If MXFP8 has no error, squared weights take its place.
        reference = MXFP8 if any(tile[MXFP8] for tile in found) else "signal"
        known = exact.squared_error if reference == MXFP8 else exact.squared_signal
        base = np.array([tile[reference] for tile in found])
        errors = {}
        for name in FORMATS:
            ratio, deviation = _ratio(np.array([tile[name] for tile in found]), base, everything)
            scale = known / exact.squared_signal if exact.squared_signal else 0.0
            errors[name] = FormatError(ratio * scale, deviation * scale)
        errors[MXFP8] = FormatError(exact.relative_squared_error, 0.0)
        sampled = (self._tile_rows(tensor, tile) for tile in tiles)
        return LayerComparison(
            tensor.name,
            linear.group,
            linear.name,
            linear.shape,
            exact.squared_signal,
            sum(end - begin for begin, end in sampled),
            errors,
        )


def _ratio(
    values: npt.NDArray[np.float64], base: npt.NDArray[np.float64], population: int
) -> tuple[float, float]:
    """Return the ratio of two sums, estimated from a sample, and its standard error.

    It is the textbook's ratio estimator with its linearised variance and the correction for a
    finite population (Cochran, Sampling Techniques, chapter 6).
    """
    total, count = float(base.sum()), base.size
    if not total:
        return 0.0, 0.0
    ratio = float(values.sum()) / total
    if count == population:
        return ratio, 0.0
    spread = float(np.square(values - ratio * base).sum()) / (count - 1)
    return ratio, math.sqrt((1 - count / population) * count * spread) / total


def _largest_magnitude(tensor: SourceTensor, data: npt.NDArray[np.uint8], rows: int) -> float:
    """Return the largest magnitude of some rows: floats without sign are ordered like integers."""
    bits: npt.NDArray[Any] = as_matrix(tensor, data, rows)
    width = SAFETENSORS_BITS[tensor.dtype]
    largest = np.max(bits & bits.dtype.type((1 << (width - 1)) - 1)).reshape(1, 1)
    value = np.empty((1, 1), np.float32)
    _core.cast(largest, FLOAT_NAMES[tensor.dtype], value, "float32", 1)
    return float(value[0, 0])


def _squares(rows: npt.NDArray[np.float32]) -> float:
    return float(np.square(rows, dtype=np.float64).sum())


def _sizes(
    checkpoint: Checkpoint, scope: Scope, linears: list[_Linear], total: GroupComparison
) -> dict[str, FormatSize]:
    model = sum(t.nbytes for name, t in checkpoint.tensors.items() if name in scope)
    rest = model - sum(linear.tensor.nbytes for linear in linears)
    sizes = {"bf16": FormatSize(16.0, rest + 2 * total.parameters)}
    for name, kind in FORMATS.items():
        bits = [kind.bits(linear.shape) for linear in linears]
        sizes[name] = FormatSize(
            sum(bits) / total.parameters, rest + sum(-(-count // 8) for count in bits)
        )
    return sizes


def _low_rank_errors(
    linears: list[_Linear],
    which: LowRank,
    threads: int,
    progress: CompareCallback | None,
    warnings: list[str],
) -> list[LowRankError]:
    """Measure low-rank branches, the third stage."""
    wanted = _low_rank_layers(linears, which)
    chosen = [linear for linear in wanted if math.prod(linear.shape) <= MAX_ELEMENTS]
    warnings += [
        f'"{linear.tensor.name}" has more than {MAX_ELEMENTS:,} weights: no low-rank branch was '
        "measured for it"
        for linear in wanted
        if math.prod(linear.shape) > MAX_ELEMENTS
    ]
    total = sum(linear.tensor.nbytes for linear in chosen) * STEPS
    done = 0
    errors: list[LowRankError] = []
    largest = max((math.prod(linear.shape) for linear in chosen), default=0)
    memory = np.empty((2, largest), np.float32)
    for linear in chosen:

        def step(tensor: SourceTensor = linear.tensor) -> None:
            nonlocal done
            done += tensor.nbytes
            if progress is not None:
                progress(CompareProgress(done, total, tensor.name, "low rank"))

        errors += measure_low_rank(linear.tensor, linear.group, memory, threads, step)
    return errors


def _low_rank_layers(linears: list[_Linear], which: LowRank) -> list[_Linear]:
    """Return all layers, none, or the middle layer of each group."""
    if which == "none":
        return []
    if which == "all":
        return linears
    groups: Mapping[str, list[_Linear]] = {linear.group: [] for linear in linears}
    for linear in linears:
        groups[linear.group].append(linear)
    return [members[len(members) // 2] for members in groups.values()]
