"""Checks of the data of a file by itself: of quantised layers, and of all other tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from ...checkpoint.identify import Identified
from ...checkpoint.quantized_layers import AGAIN, Breach, QuantizedLayer
from ...checkpoint.source import SourceTensor
from ...streaming.formats import format_of
from ...streaming.formats.weight_format import Bytes
from ...streaming.jobs import Job, byte_chunks, row_chunks
from ...streaming.rows import read_encoded
from ...streaming.worker import Worker
from ..nonfinite import can_be_nonfinite, first_nonfinite
from .report import ValidationReport

Counts = dict[str, Counter[str]]  # how many elements have a problem, by tensor and problem


class KeptScan:
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
        """Return the jobs that look at every such tensor."""
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


class DataScan:
    """Checks of codes and scales without the original."""

    def __init__(self) -> None:
        self._breaches: list[tuple[str, str, int]] = []  # these two are appended to by all workers
        self._notes: list[tuple[str, str, int]] = []

    def jobs(self, layer: QuantizedLayer) -> list[Job]:
        """Return the jobs that read a layer and check it."""
        row_nbytes = layer.weight.nbytes // layer.weight.shape[0]

        def job(begin: int, end: int) -> Job:
            def run(worker: Worker) -> None:
                self.scan(layer, *read_encoded(worker, layer, begin, end), begin)

            return Job(layer.weight.name, (end - begin) * row_nbytes, run)

        return [job(begin, end) for begin, end in row_chunks(layer.weight)]

    def scan(self, layer: QuantizedLayer, codes: Bytes, scales: Bytes, begin: int) -> None:
        """Check the rows from `begin` on, as `read_encoded` gives them."""
        flaws = format_of(layer).flaws(layer, codes, scales, begin)
        self._breaches += [breach for breach in flaws.breaches if breach[2]]
        self._notes += [note for note in flaws.notes if note[2]]

    def flaws(self) -> Counts:
        """Return the flaws of all rows that were scanned."""
        return _totals(self._breaches)

    def notes(self) -> list[str]:
        """Return what only some programs read otherwise, one sentence for each tensor."""
        return [
            f'"{tensor}" {what} ({count:,})'
            for tensor, counts in sorted(_totals(self._notes).items())
            for what, count in counts.items()
        ]


def _totals(found: Iterable[tuple[str, str, int]]) -> Counts:
    """Add up (tensor, problem, number of elements) of pieces of tensors."""
    totals: Counts = {}
    for tensor, what, count in found:
        totals.setdefault(tensor, Counter())[what] += count
    return totals
