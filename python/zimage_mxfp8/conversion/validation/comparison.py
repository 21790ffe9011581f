"""The comparison of a quantised file with its original."""

from __future__ import annotations

import numpy as np

from ...checkpoint import quantization as markers
from ...checkpoint.provenance import PROVENANCE_KEY
from ...checkpoint.quantized_layers import AGAIN, Breach, QuantizedLayer
from ...checkpoint.source import Checkpoint, SourceTensor
from ...dtypes import FLOAT_NAMES, SAFETENSORS_BITS, as_integers
from ...errors import NonFiniteError
from ...streaming.error_stats import ErrorStats, merge_rows
from ...streaming.formats import format_of
from ...streaming.jobs import Job, byte_chunks, row_chunks
from ...streaming.rows import encode_rows, measure_rows, read_encoded, round_to_bfloat16
from ...streaming.worker import Worker
from ...text import plural
from ..bias_correction import to_float64
from .report import ValidationReport
from .scans import Counts, DataScan


class Comparison:
    """The comparison of a file with its original."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        layers: list[QuantizedLayer],
        original: Checkpoint,
        report: ValidationReport,
        scan: DataScan,
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
        """Compare headers, and return the jobs that compare data."""
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

    def finish(self, flaws: Counts) -> None:
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

    def _report_differences(self, tensor: str, count: int, what: str, flaws: Counts) -> None:
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
