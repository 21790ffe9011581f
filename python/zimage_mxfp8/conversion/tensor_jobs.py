"""Jobs for each tensor of a plan: encode it, cast it or copy it to its place in the output."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from ..checkpoint import quantization as markers
from ..checkpoint.source import SourceTensor
from ..dtypes import FLOAT_NAMES, SAFETENSORS_BITS, as_integers
from ..streaming.encoder import Encoder
from ..streaming.error_stats import ErrorStats
from ..streaming.jobs import Job, byte_chunks, copy_jobs, header_job, row_chunks
from ..streaming.rows import as_matrix, encode_rows, measure_rows, round_to_bfloat16
from ..streaming.worker import Worker
from ..zimage.sampling import Vector
from .bias_correction import add_to_bias
from .nonfinite import KEEP_HINT, KeptTensorCheck
from .plan import Plan, PlannedTensor

Bytes = npt.NDArray[np.uint8]


class TensorJobs:
    """The jobs that write a plan's output, with their error statistics.

    Args:
        plan: the conversion.
        encoder: where weights are encoded.
        corrections: layer -> the vector [columns] that its bias is corrected with.
        measure_errors: whether to measure the error of each weight.

    Attributes:
        errors: (weight, first row) -> error statistics, if they are measured.
        kept: the check for NaN and Inf in tensors that are not quantised.
    """

    def __init__(
        self,
        plan: Plan,
        encoder: Encoder,
        corrections: Mapping[str, Vector],
        *,
        measure_errors: bool,
    ) -> None:
        self.errors: dict[tuple[str, int], ErrorStats] = {}
        self.kept = KeptTensorCheck(keep=plan.options.nonfinite == "keep")
        self._plan = plan
        self._form = plan.options.weight_format
        self._encoder = encoder
        self._corrections = corrections
        self._measure_errors = measure_errors

    def all(self) -> list[Job]:
        """Return the jobs, in the order of the output file."""
        plan, jobs = self._plan, [header_job(self._plan.header)]
        corrected = {f"{layer}.bias" for layer in self._corrections}
        for name in sorted(plan.tensors, key=self._position):
            planned = plan.tensors[name]
            if name in corrected:
                continue  # written with its layer
            if planned.action == "quantize":
                jobs += self._quantize(planned)
            elif planned.action == "cast":
                jobs += self._cast(planned.source)
            else:
                check = self.kept.check if name in plan.scope else None
                jobs += copy_jobs(planned.source, self._position(name), check)
        return jobs

    def _position(self, name: str) -> int:
        return self._plan.places[name].begin

    def _quantize(self, planned: PlannedTensor) -> list[Job]:
        """Return the jobs that encode a weight, and write its layer's marker and corrected bias."""
        plan, tensor = self._plan, planned.source
        rows, cols = tensor.shape
        codes_at = self._position(tensor.name)
        scales_at = self._position(planned.layer + markers.SCALE_SUFFIX)
        code_row = self._form.codes((rows, cols)).row_nbytes
        scale_row = self._form.scales((rows, cols)).row_nbytes
        marker_at = self._position(planned.layer + markers.MARKER_SUFFIX)
        marker = np.frombuffer(markers.marker_bytes(plan.layers[planned.layer]), np.uint8)

        def job(begin: int, end: int) -> Job:
            def run(worker: Worker) -> None:
                positions = codes_at + begin * code_row, scales_at + begin * scale_row
                data, codes, scales = encode_rows(
                    worker,
                    tensor,
                    begin,
                    end,
                    plan.recipe.source_rounding,
                    positions,
                    form=self._form,
                    encoder=self._encoder,
                    nonfinite_hint=KEEP_HINT,
                )
                worker.write(positions[0], codes)
                worker.write(positions[1], scales)
                if begin == 0:
                    worker.write(marker_at, marker)
                if planned.layer in self._corrections:
                    matrix = as_matrix(tensor, data, end - begin)
                    self._correct_bias(worker, planned, begin, matrix, codes, scales)
                if self._measure_errors:
                    self.errors[tensor.name, begin] = measure_rows(
                        tensor, data, end - begin, codes, scales, self._form
                    )

            return Job(tensor.name, (end - begin) * (tensor.nbytes // rows), run)

        return [job(begin, end) for begin, end in row_chunks(tensor)]

    def _correct_bias(
        self,
        worker: Worker,
        planned: PlannedTensor,
        begin: int,
        matrix: npt.NDArray[np.generic],
        codes: Bytes,
        scales: Bytes,
    ) -> None:
        """Write the elements of a bias, from `begin` on, that belong to rows just encoded.

        Args:
            worker: reads and writes.
            planned: the layer.
            begin: number of the first row.
            matrix: the rows before encoding.
            codes: the rows' codes.
            scales: their scales.
        """
        assert planned.bias is not None
        bias, rows = self._plan.checkpoint.tensors[planned.bias], len(matrix)
        dtype = FLOAT_NAMES[planned.source.dtype]
        correction = self._corrections[planned.layer]
        change = self._form.change_times(matrix, dtype, codes, scales, correction)
        item = bias.nbytes // bias.shape[0]
        old = worker.read(bias, begin * item, rows * item, "bias")
        self.kept.check(bias, begin * item, old)
        worker.write(self._position(bias.name) + begin * item, add_to_bias(bias, old, change))

    def _cast(self, tensor: SourceTensor) -> list[Job]:
        """Return the jobs that write an F16 or F32 tensor as BF16."""
        position, item = self._position(tensor.name), SAFETENSORS_BITS[tensor.dtype] // 8

        def job(begin: int, end: int) -> Job:
            def run(worker: Worker) -> None:
                data = worker.read(tensor, begin, end - begin)
                self.kept.check(tensor, begin, data)
                source = as_integers(tensor.dtype, data).reshape(1, -1)
                target, _ = round_to_bfloat16(worker, source, FLOAT_NAMES[tensor.dtype])
                worker.write(position + begin // item * 2, target)

            return Job(tensor.name, end - begin, run)

        return [job(begin, end) for begin, end in byte_chunks(tensor)]
