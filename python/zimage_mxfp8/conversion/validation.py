"""Validation of a quantised checkpoint against the file contract and its original."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors

from ..checkpoint import quantization as markers
from ..checkpoint.find_layers import find_layers
from ..checkpoint.header import read_header
from ..checkpoint.identify import Identified, open_for
from ..checkpoint.provenance import PROVENANCE_KEY, read_provenance
from ..checkpoint.quantized_layers import AGAIN, Breach, QuantizedLayer, QuantizedLayers
from ..checkpoint.scopes import COMFYUI_PREFIXES
from ..checkpoint.source import Checkpoint, SourceTensor
from ..checkpoint.structure import missing_or_misshapen, unknown_weights
from ..dtypes import FLOAT_NAMES, SAFETENSORS_BITS, as_integers
from ..errors import CheckpointError, NonFiniteError, UsageError, WrongKindError
from ..printing.progress import byte_bar, shown
from ..streaming.error_stats import ErrorStats, merge_rows
from ..streaming.formats import format_of
from ..streaming.jobs import Job, ProgressCallback, byte_chunks, row_chunks, run_jobs
from ..streaming.rows import encode_rows, measure_rows, read_encoded, round_to_bfloat16
from ..streaming.worker import Worker
from ..text import plural
from .bias_correction import to_float64
from .merging import Merge, MergedAdapter
from .nonfinite import can_be_nonfinite, first_nonfinite
from .options import AnyPath, weighted_files

Bytes = npt.NDArray[np.uint8]
_Flaws = dict[str, Counter[str]]  # how many elements have a problem, by tensor and problem


@dataclass(repr=False)
class ValidationReport:
    """Results of `validate`.

    Attributes:
        file: the file that was checked.
        against: the original it was compared with, if any.
        layers: number of quantised layers that are stored according to the contract.
        format: title of their format.
        breaches: broken rules; empty for a sound file.
        notes: remarks that are not breaches.
        errors: per layer's weight, its error against the original; empty without one.
        loras: adapters that were merged into the original before it was compared.
    """

    file: str
    against: str | None
    layers: int
    format: str = "MXFP8"
    breaches: list[Breach] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    errors: dict[str, ErrorStats] = field(default_factory=dict)
    loras: list[dict[str, Any]] = field(default_factory=list)

    def __repr__(self) -> str:
        layers = plural(self.layers, f"{self.format} layer")
        breaches = plural(len(self.breaches), "breach", "breaches")
        return f"ValidationReport({self.file!r}, {layers}, {breaches})"

    def __str__(self) -> str:
        from ..printing.screen import as_text
        from ..printing.validation import print_validation

        return as_text(lambda screen: print_validation(self, screen))

    @property
    def ok(self) -> bool:
        """Whether no rule is broken."""
        return not self.breaches

    def to_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        return {
            "file": self.file,
            "against": self.against,
            "loras": self.loras,
            "ok": self.ok,
            "layers": self.layers,
            "format": self.format,
            "breaches": [vars(breach) for breach in self.breaches],
            "notes": self.notes,
            "tensors": {name: stats.to_dict() for name, stats in self.errors.items()},
        }


def validate(
    file: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    *,
    loras: Iterable[AnyPath | tuple[AnyPath, float]] = (),
    threads: int = 0,
    progress: ProgressCallback | bool | None = None,
) -> ValidationReport:
    """Check a checkpoint in MXFP8 or INT8 ConvRot.

    Checks names, types, shapes, markers and the header, then the data: codes and scales that are
    NaN or should not occur, padding, blocks of zeros, NaN and Inf anywhere else. With the original
    it also encodes every layer again and compares codes, scales and their order byte by byte,
    compares all other tensors, and measures errors.

    Args:
        file: the quantised file.
        against: the checkpoint that it was converted from (file or diffusers folder).
        loras: the adapters that were merged when it was converted, as in `ConversionOptions`: they
            are merged into the original again, and all of the above is compared with that.
        threads: cores to use; 0 means all.
        progress: called with a `Progress` from this thread; True draws a bar on a terminal.

    Raises:
        UsageError: `loras` without `against`.
        CheckpointError: a file is unreadable or malformed, `file` is not quantised in one of these
            formats, `against` is not a plain checkpoint, or adapters were merged and `loras` does
            not name them.
    """
    adapters = weighted_files(loras)
    if adapters and against is None:
        raise UsageError("loras", "cannot be used without the original", "give `against`")
    try:
        found = open_for(file, "validate")
    except WrongKindError:
        if against is not None and _are_swapped(file, against):
            raise CheckpointError(
                f"{file} is an original and {against} is quantised, so they are swapped",
                "name the quantised file first, and the original with `against`",
            ) from None
        raise
    checkpoint = found.checkpoint
    quantized = find_layers(found)
    layers = quantized.layers
    report = ValidationReport(
        str(file),
        None if against is None else str(against),
        len(layers),
        found.format.title if found.format else "",
        quantized.breaches,
    )
    report.notes += quantized.notes
    _check_readable_by_others(checkpoint, report)
    original = None
    if against is not None:
        original = _original(against, adapters, checkpoint, layers, report)
    _check_model(found, quantized, original, report)
    scan = _DataScan(report)
    comparison = None
    jobs: list[Job] = []
    scanned: set[str] = set()
    if original is not None:
        comparison = _Comparison(checkpoint, layers, original, report, scan)
        jobs = comparison.jobs()
        scanned = comparison.compared
    for layer in layers:
        if layer.name not in scanned:
            jobs += scan.jobs(layer)
    kept = _KeptScan(found, layers, report)
    jobs += kept.jobs()
    with shown(progress, byte_bar("checking")) as callback:
        run_jobs(jobs, None, threads=threads, progress=callback)
    flaws = scan.flaws()
    kept.finish(comparison.changed if comparison else ())
    if comparison is not None:
        comparison.finish(flaws)
    for tensor, counts in sorted(flaws.items()):
        for problem, count in sorted(counts.items()):
            report.breaches.append(Breach(tensor, f"{problem} ({count:,})", AGAIN))
    return report


def _are_swapped(file: str | os.PathLike[str], against: str | os.PathLike[str]) -> bool:
    """Return whether the first is an original, and the second can be checked against it."""
    try:
        open_for(file, "original", any_model=True)
        open_for(against, "validate")
    except CheckpointError:
        return False
    return True


def _original(
    against: str | os.PathLike[str],
    adapters: Sequence[tuple[Path, float]],
    checkpoint: Checkpoint,
    layers: Sequence[QuantizedLayer],
    report: ValidationReport,
) -> Checkpoint:
    """Open the original, with the adapters in it that were merged into the file."""
    found = open_for(against, "original", any_model=True)
    merged = (read_provenance(checkpoint.metadata) or {}).get("loras") or []
    if not adapters:
        if merged:
            raise CheckpointError(
                f"{checkpoint.path} was converted with {plural(len(merged), 'adapter')} merged in, "
                "so that its weights are not the original's",
                "name them and their weights with `loras`, or leave out `against`",
            )
        return found.checkpoint
    merge = Merge(found, adapters)
    report.loras = [adapter.to_dict() for adapter in merge.adapters]
    if [_identity(adapter) for adapter in merge.adapters] != merged:
        report.notes.append(
            "these are not the adapters and weights that the file's header names, in that order"
        )
    return merge.apply({layer.weight.name for layer in layers})


def _identity(adapter: MergedAdapter) -> dict[str, Any]:
    """Return what the header says of an adapter."""
    return {"sha256": adapter.sha256, "weight": adapter.weight}


def _check_readable_by_others(checkpoint: Checkpoint, report: ValidationReport) -> None:
    """Check that the safetensors library, with its own parser, sees the same tensors."""
    unseen: set[str] = set()
    try:
        for path in checkpoint.files:
            with safetensors.safe_open(path, framework="np") as opened:
                unseen |= read_header(path).tensors.keys() - set(opened.keys())
    except (safetensors.SafetensorError, OSError) as error:
        problem = f"is refused by the safetensors library: {error}"
        report.breaches.append(Breach(path.name, problem, AGAIN))
        return
    if unseen:
        report.breaches.append(Breach(min(unseen), "is unseen by the safetensors library", AGAIN))


def _check_model(
    found: Identified,
    quantized: QuantizedLayers,
    original: Checkpoint | None,
    report: ValidationReport,
) -> None:
    checkpoint, scope = found.checkpoint, found.scope
    if not scope.zimage:
        report.notes.append("not a Z-Image transformer: its tensors were not counted")
        return
    shapes = {layer.weight.name: layer.shape for layer in quantized.layers}
    scales = {layer.scale.name for layer in quantized.layers}
    scales |= {name + markers.SCALE_SUFFIX for name in quantized.broken}
    explained = {name + markers.WEIGHT_SUFFIX for name in quantized.broken}
    found_problems = (
        ("complete", missing_or_misshapen(checkpoint, scope, shapes)),
        ("take it out of", unknown_weights(checkpoint, scope, scales)),
    )
    for verb, problems in found_problems:
        for name, problem in problems:
            if name in explained:
                continue
            is_ours = original is not None and _shape(original, name) != _shape(checkpoint, name)
            remedy = AGAIN if is_ours else f"{verb} the original and convert it again"
            report.breaches.append(Breach(name, problem, remedy))
    if scope.prefix not in COMFYUI_PREFIXES:
        report.notes.append(
            f'the prefix "{scope.prefix}" is not one that ComfyUI strips: it does not load the file'
        )


def _shape(checkpoint: Checkpoint, name: str) -> tuple[int, ...] | None:
    tensor = checkpoint.tensors.get(name)
    return None if tensor is None else tensor.shape


class _KeptScan:
    """A check for NaN and Inf in floating-point tensors that are not quantised."""

    def __init__(
        self, found: Identified, layers: list[QuantizedLayer], report: ValidationReport
    ) -> None:
        self._found = found
        self._encoded = {layer.weight.name for layer in layers}
        self._encoded |= {layer.scale.name for layer in layers}
        self._report = report
        self._bad: set[str] = set()  # added to by all workers

    def jobs(self) -> list[Job]:
        return [
            self._job(tensor, begin, end)
            for name, tensor in self._found.checkpoint.tensors.items()
            if name not in self._encoded and can_be_nonfinite(tensor.dtype)
            for begin, end in byte_chunks(tensor)
        ]

    def _job(self, tensor: SourceTensor, begin: int, end: int) -> Job:
        def run(worker: Worker) -> None:
            if first_nonfinite(tensor.dtype, worker.read(tensor, begin, end - begin)) is not None:
                self._bad.add(tensor.name)

        return Job(tensor.name, end - begin, run)

    def finish(self, changed: Collection[str]) -> None:
        """Report what was found; `changed` are tensors that differ from the original's."""
        for name in sorted(self._bad):
            if name in self._found.scope:
                problem = "has NaN or Inf, which make every image NaN"
                remedy = AGAIN if name in changed else "repair the original and convert it again"
                self._report.breaches.append(Breach(name, problem, remedy))
            else:
                self._report.notes.append(f'"{name}", outside the transformer, has NaN or Inf')


class _DataScan:
    """Checks of codes and scales without the original."""

    def __init__(self, report: ValidationReport) -> None:
        self._report = report
        self._found: list[tuple[str, str, int]] = []  # appended to by all workers

    def jobs(self, layer: QuantizedLayer) -> list[Job]:
        row_nbytes = layer.weight.nbytes // layer.weight.shape[0]

        def job(begin: int, end: int) -> Job:
            def run(worker: Worker) -> None:
                self.scan(layer, *read_encoded(worker, layer, begin, end), begin)

            return Job(layer.weight.name, (end - begin) * row_nbytes, run)

        return [job(begin, end) for begin, end in row_chunks(layer.weight)]

    def scan(self, layer: QuantizedLayer, codes: Bytes, scales: Bytes, begin: int) -> None:
        """Check the rows from `begin` on, as `read_encoded` gives them."""
        flaws = format_of(layer).flaws(layer, codes, scales, begin)
        self._found += [breach for breach in flaws.breaches if breach[2]]
        self._report.notes += flaws.notes

    def flaws(self) -> _Flaws:
        """Return the flaws of all rows that were scanned."""
        totals: _Flaws = {}
        for tensor, what, count in self._found:
            totals.setdefault(tensor, Counter())[what] += count
        return totals


class _Comparison:
    """The comparison of a file with its original."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        layers: list[QuantizedLayer],
        original: Checkpoint,
        report: ValidationReport,
        scan: _DataScan,
    ) -> None:
        self._scan = scan
        self.compared: set[str] = set()  # layers with data that the jobs read, and so also scan
        self.changed: set[str] = set()  # tensors that differ, though they are not quantised
        self._checkpoint = checkpoint
        self._layers = {layer.name: layer for layer in layers}
        self._original = original
        self._report = report
        # Layer, way of rounding the source (see Recipe.source_rounding), differing codes, scales;
        # appended to by all workers.
        self._differences: list[tuple[str, bool, int, int]] = []
        self._stats: dict[tuple[str, int], ErrorStats] = {}
        self._bias_changes: list[float] = []

    def jobs(self) -> list[Job]:
        jobs = []
        for key, value in self._original.metadata.items():
            if (
                key not in (markers.HEADER_KEY, PROVENANCE_KEY)
                and self._checkpoint.metadata.get(key) != value
            ):
                self._breach(key, "is metadata of the original that is lost or changed")
        weights = {layer.weight.name: layer for layer in self._layers.values()}
        biases = {layer.name + ".bias" for layer in self._layers.values()}
        for name, tensor in self._original.tensors.items():
            found = self._checkpoint.tensors.get(name)
            if found is None:
                self._breach(name, "is missing, though the original has it")
            elif name in weights:
                jobs += self._weight_jobs(weights[name], tensor)
            elif found.dtype in ("F8_E4M3", "I8") and tensor.dtype in FLOAT_NAMES:
                continue  # a layer with breaches of its own
            elif name not in biases:
                jobs += self._copy_check_jobs(found, tensor)
            elif (found.dtype, found.shape) != (tensor.dtype, tensor.shape):
                self._breach(name, "has another type or shape than the original's")
            elif found.dtype in FLOAT_NAMES:
                jobs.append(self._bias_job(found, tensor))
        for name in sorted(self._checkpoint.tensors.keys() - self._original.tensors.keys()):
            if not name.endswith((markers.SCALE_SUFFIX, markers.MARKER_SUFFIX)):
                self._breach(name, "is not in the original")
        return jobs

    def _breach(self, tensor: str, problem: str) -> None:
        """Report a tensor, unless a breach explains already why it differs from the original."""
        if all(breach.tensor != tensor for breach in self._report.breaches):
            self._report.breaches.append(Breach(tensor, problem, AGAIN))

    def _weight_jobs(self, layer: QuantizedLayer, original: SourceTensor) -> list[Job]:
        if original.shape != layer.shape or original.dtype not in FLOAT_NAMES:
            self._breach(
                layer.weight.name,
                f"encodes {list(layer.shape)}, but the original is {original.dtype} "
                f"{list(original.shape)}",
            )
            return []
        self.compared.add(layer.name)
        form = format_of(layer)
        roundings = (False,) if original.dtype == "BF16" else (False, True)

        def job(begin: int, end: int) -> Job:
            def run(worker: Worker) -> None:
                rows = form.codes((end - begin, layer.shape[1])).shape[0]
                file_codes, file_scales = read_encoded(worker, layer, begin, begin + rows)
                self._scan.scan(layer, file_codes, file_scales, begin)
                for rounding in roundings:
                    try:
                        data, codes, scales = encode_rows(
                            worker, original, begin, end, rounding, form=form
                        )
                    except NonFiniteError as error:
                        self._breach(
                            layer.weight.name,
                            f"encodes an original with NaN or Inf (row {error.row}, column "
                            f"{error.column})",
                        )
                        return
                    wrong_codes = int(np.count_nonzero(codes != file_codes))
                    scale = np.dtype((np.void, form.scales(layer.shape).item_nbytes))
                    wrong_scales = int((scales.view(scale) != file_scales.view(scale)).sum())
                    self._differences.append((layer.name, rounding, wrong_codes, wrong_scales))
                self._stats[layer.weight.name, begin] = measure_rows(
                    original, data, end - begin, file_codes, file_scales, form
                )

            return Job(layer.weight.name, (end - begin) * layer.shape[1], run)

        return [job(begin, end) for begin, end in row_chunks(original)]

    def _bias_job(self, found: SourceTensor, original: SourceTensor) -> Job:
        """Return a job that compares a bias, which the correction may have moved."""

        def run(worker: Worker) -> None:
            old = to_float64(original, worker.read(original, 0, original.nbytes))
            new = to_float64(found, worker.read(found, 0, found.nbytes, "file"))
            if np.isfinite(old).all() and not np.isfinite(new).all():
                self.changed.add(found.name)
            elif old.size:
                self._bias_changes.append(float(np.abs(new - old).max()))

        return Job(found.name, original.nbytes, run)

    def _copy_check_jobs(self, found: SourceTensor, original: SourceTensor) -> list[Job]:
        """Return the jobs that compare a tensor that was kept, or cast to BF16."""
        cast = found.dtype == "BF16" and original.dtype in ("F16", "F32")
        if found.shape != original.shape or (found.dtype != original.dtype and not cast):
            self._breach(
                found.name,
                f"is {found.dtype} {list(found.shape)}, the original {original.dtype} "
                f"{list(original.shape)}",
            )
            return []
        item = SAFETENSORS_BITS[original.dtype] // 8

        def job(begin: int, end: int) -> Job:
            def run(worker: Worker) -> None:
                expected = worker.read(original, begin, end - begin)
                if cast:
                    source = as_integers(original.dtype, expected).reshape(1, -1)
                    rounded, _ = round_to_bfloat16(worker, source, FLOAT_NAMES[original.dtype])
                    expected = rounded.reshape(-1).view(np.uint8)
                at = begin // item * 2 if cast else begin
                if not np.array_equal(expected, worker.read(found, at, expected.size, "file")):
                    self.changed.add(found.name)

            return Job(found.name, end - begin, run)

        return [job(begin, end) for begin, end in byte_chunks(original)]

    def finish(self, flaws: _Flaws) -> None:
        """Report the differences; removes the flaws that they explain."""
        moved = [change for change in self._bias_changes if change != 0]
        if moved:
            self._report.notes.append(
                f"{plural(len(moved), 'bias differs', 'biases differ')} from the original's, by up "
                f"to {max(moved):.2e}: the bias correction, which is not checked"
            )
        for name in sorted(self.changed):
            self._breach(name, "differs from the original, though it is not quantised")
        wrong: dict[str, dict[bool, list[int]]] = {}
        for name, rounding, codes, scales in self._differences:
            total = wrong.setdefault(name, {}).setdefault(rounding, [0, 0])
            total[0] += codes
            total[1] += scales
        for name in sorted(wrong):
            rounding = min(wrong[name], key=lambda way: sum(wrong[name][way]))
            codes, scales = wrong[name][rounding]
            layer = self._layers[name]
            if scales and (order := self._diagnose_scales(layer, rounding)):
                flaws.pop(layer.scale.name, None)
                self._breach(layer.scale.name, order)
            else:
                what = "scales that differ from the original's"
                self._report_differences(layer.scale.name, scales, what, flaws)
            what = "codes that are not the original's rounded to nearest"
            self._report_differences(layer.weight.name, codes, what, flaws)
        self._report.errors = merge_rows(self._stats)

    def _report_differences(self, tensor: str, count: int, what: str, flaws: _Flaws) -> None:
        """Report how many elements differ from the original's, without those that have flaws."""
        if not count:  # what looks like a flaw is the original's, or another tensor's
            flaws.pop(tensor, None)
        others = count - sum(flaws.get(tensor, {}).values())
        if others > 0:
            more = "more " if tensor in flaws else ""
            self._breach(tensor, f"has {more}{what} ({others:,})")

    def _diagnose_scales(self, layer: QuantizedLayer, source_rounding: bool) -> str | None:
        """Return the order of a layer's scales, if it is a known wrong one."""
        form, worker = format_of(layer), Worker(None)
        try:
            stored = form.scales(layer.shape)
            expected = np.empty((stored.shape[0], stored.row_nbytes), np.uint8)
            tensor = self._original.tensors[layer.weight.name]
            for begin, end in row_chunks(tensor):
                _, _, scales = encode_rows(worker, tensor, begin, end, source_rounding, form=form)
                rows = scales.size // expected.shape[1]
                expected[begin : begin + rows] = scales.reshape(rows, -1)
            found = worker.read(layer.scale, 0, layer.scale.nbytes)
        finally:
            worker.close()
        return form.misordering(expected, found)
