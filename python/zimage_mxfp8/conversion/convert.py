"""Conversion of a checkpoint to MXFP8 or INT8 ConvRot: plan, run, report.

    options = ConversionOptions(recipe="zimage")
    plan = plan_conversion("z_image_turbo_bf16.safetensors", options)
    report = run_conversion(plan, "z_image_turbo-mxfp8.safetensors")

`convert` does all three.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .. import _core
from ..checkpoint.file_names import checkpoint_beside
from ..checkpoint.identify import open_for
from ..checkpoint.output import AtomicFile, check_distinct, check_target, write_file
from ..checkpoint.source import SourceTensor, sha256
from ..checks import check_threads, file_or_folder
from ..checks import path as path_argument
from ..errors import NonFiniteError, UsageError
from ..printing.progress import byte_bar, shown
from ..streaming.encoder import CudaEncoder
from ..streaming.error_stats import merge_rows
from ..streaming.formats import FormatName
from ..streaming.jobs import Job, ProgressCallback, row_chunks, run_jobs
from ..streaming.rows import read_rows
from ..streaming.worker import Worker
from ..text import plural
from ..zimage.sampling import Vector
from .bias_correction import correction_inputs
from .merging import Merge
from .options import ConversionKeywords, ConversionOptions
from .plan import Plan, make_plan
from .report import ConversionReport
from .tensor_jobs import TensorJobs

if TYPE_CHECKING:
    from typing_extensions import Unpack


def default_output(source: Path, form: FormatName = "mxfp8") -> Path:
    """Return the input's name with the format, as in `-mxfp8`, before `.safetensors`."""
    return checkpoint_beside(source, f"-{form}")


def plan_conversion(
    source: str | os.PathLike[str],
    options: ConversionOptions | None = None,
    *,
    threads: int = 0,
) -> Plan:
    """Plan a conversion, without writing anything.

    Reads the header only; with `nonfinite="keep"` also every weight that the recipe would
    quantise, and with `loras` the adapters.

    Args:
        source: a ComfyUI single file (names under any prefix or none, alone or with other models
            in the file) or a diffusers folder; BF16, F16 or F32 weights.
        options: everything that decides the bytes of the file; by default `ConversionOptions()`.
        threads: cores to use; 0 means all.

    Returns:
        A `Plan`, for `run_conversion`.

    Raises:
        UsageError: an argument of the wrong type.
        CheckpointError: the input is unreadable, malformed, not a whole Z-Image, quantised
            already, or the recipe keeps all of it; or an adapter is unreadable or does not fit.
    """
    options = ConversionOptions() if options is None else options
    if not isinstance(options, ConversionOptions):
        raise UsageError("options", f"must be ConversionOptions, not {type(options).__name__}")
    check_threads(threads)
    path = file_or_folder("source", source)
    found = open_for(path, "convert", any_model=options.any_model)
    options = options.for_kind(found.kind)
    plan = make_plan(found, options)
    names = _find_nonfinite(plan, threads) if options.nonfinite == "keep" else set()
    if names:
        plan = make_plan(found, options, keep_names=names)
    if options.loras:
        merge = Merge(found, options.weighted_loras)
        checkpoint = merge.apply({planned.source.name for planned in plan.quantized}, names)
        found = replace(found, checkpoint=checkpoint)
        plan = make_plan(found, options, keep_names=names, adapters=merge.adapters)
        plan = replace(
            plan,
            warnings=(*merge.warnings, *plan.warnings),
            notes=(*plan.notes, *merge.notes),
        )
    return replace(plan, warnings=(*_kept_nonfinite(names), *plan.warnings))


def run_conversion(
    plan: Plan,
    output: str | os.PathLike[str] | None = None,
    *,
    overwrite: bool = False,
    error_stats: bool = False,
    report: str | os.PathLike[str] | None = None,
    threads: int = 0,
    device: str = "cpu",
    progress: ProgressCallback | bool | None = None,
) -> ConversionReport:
    """Run a plan: write its file.

    Reading, encoding and writing overlap, and memory does not grow with the checkpoint. The output
    appears whole or not at all, and depends on the input and the options alone.

    Args:
        plan: from `plan_conversion`. Its source must not have changed since.
        output: file to write; by default the input's name with `-` and the format before the
            suffix.
        overwrite: replace an existing output, and an existing report.
        error_stats: measure each layer's error in the same pass; see `ConversionReport.errors`.
        report: file to write the `ConversionReport` to as JSON, with each layer's error.
        threads: cores to use; 0 means all.
        device: "cpu", "cuda" or "cuda:N": where weights are encoded; the bytes are the same. INT8
            ConvRot is encoded on the CPU.
        progress: called with a `Progress` from this thread, many times per second; True draws a bar
            on a terminal.

    Returns:
        A `ConversionReport`.

    Raises:
        UsageError: an argument of the wrong type, a device that the format is not encoded on, or
            the output is the input.
        NonFiniteError: a tensor of the transformer has NaN or Inf; the sentence names tensor, row
            and column.
        OutputError: the output cannot be written, or exists already.
        UnsupportedError: `device` does not exist, or this build has no CUDA; or torch is needed and
            has too little memory.
        MissingExtraError: the synthetic bias correction needs torch.
    """
    started = time.perf_counter()
    encoder = plan.options.weight_format.encoder(device)
    check_threads(threads)
    source = plan.checkpoint.path
    target = (
        default_output(source, plan.options.format)
        if output is None
        else path_argument("output", output)
    )
    report_file = None if report is None else path_argument("report", report)
    sources = list(plan.checkpoint.inputs)
    if Path(plan.recipe.name).is_file():
        sources.append(Path(plan.recipe.name))
    sources += [path for path, _ in plan.options.weighted_loras]
    check_target(target, sources, overwrite=overwrite)
    if report_file is not None:
        check_target(report_file, sources, overwrite=overwrite, argument="report")
        check_distinct({"output": target, "report": report_file})
    if plan.options.hash_source:
        plan = plan.with_source_hashes([sha256(path) for path in plan.checkpoint.files])
    if isinstance(encoder, CudaEncoder):
        encoder.warm_up()
    corrections, uncorrected = _corrections(plan)
    jobs = TensorJobs(
        plan, encoder, corrections, measure_errors=error_stats or report_file is not None
    )
    with (
        shown(progress, byte_bar("converting")) as callback,
        AtomicFile(target, plan.size, overwrite=overwrite) as file,
    ):
        run_jobs(jobs.all(), file, threads=threads, progress=callback)
    result = ConversionReport(
        input=str(source),
        output=str(target),
        format=plan.options.format,
        recipe=plan.recipe.name,
        bias_correction=plan.options.bias_correction,
        quantized=len(plan.quantized),
        kept=dict(Counter(p.reason for p in plan.tensors.values() if p.reason)),
        corrected_biases=len(corrections),
        input_bytes=plan.checkpoint.nbytes,
        output_bytes=plan.size - len(plan.header),
        file_bytes=plan.size,
        seconds=time.perf_counter() - started,
        warnings=_warnings(plan, jobs.kept.found, uncorrected),
        notes=list(plan.notes),
        loras=[adapter.to_dict() for adapter in plan.adapters],
        errors=merge_rows(jobs.errors) if error_stats or report_file is not None else None,
    )
    if report_file is not None:
        content = json.dumps(result.to_dict(), indent=1).encode()
        write_file(report_file, content, overwrite=overwrite)
    return result


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    overwrite: bool = False,
    error_stats: bool = False,
    report: str | os.PathLike[str] | None = None,
    threads: int = 0,
    device: str = "cpu",
    progress: ProgressCallback | bool | None = None,
    **options: Unpack[ConversionKeywords],
) -> ConversionReport:
    """Convert a Z-Image checkpoint to MXFP8 or INT8 ConvRot, for ComfyUI and for this package.

        zm.convert("z_image_turbo_bf16.safetensors", recipe="zimage", overwrite=True)

    Args:
        source: see `plan_conversion`.
        output: file to write; by default the input's name with `-` and the format before the
            suffix.
        overwrite: replace an existing output, and an existing report.
        error_stats: measure each layer's error in the same pass.
        report: file to write the `ConversionReport` to as JSON.
        threads: cores to use; 0 means all.
        device: where weights are encoded.
        progress: called with a `Progress`; True draws a bar on a terminal.
        options: fields of `ConversionOptions`.

    Returns:
        A `ConversionReport`.

    Raises:
        Error: the exceptions of `ConversionOptions`, `plan_conversion` and `run_conversion`.
    """
    # Errors in these are reported now, not after weights were read.
    checked = ConversionOptions(**options)
    checked.weight_format.encoder(device)
    path = file_or_folder("source", source)
    target = (
        default_output(path, checked.format) if output is None else path_argument("output", output)
    )
    plan = plan_conversion(path, checked, threads=threads)
    return run_conversion(
        plan,
        target,
        overwrite=overwrite,
        error_stats=error_stats,
        report=report,
        threads=threads,
        device=device,
        progress=progress,
    )


def _corrections(plan: Plan) -> tuple[dict[str, Vector], list[str]]:
    """Return `correction_inputs`, or none of them if the embedder has NaN that is kept."""
    try:
        return correction_inputs(plan)
    except NonFiniteError:  # in the embedder
        if plan.options.nonfinite == "error":
            raise
        return {}, sorted(p.layer for p in plan.quantized if p.bias)


def _warnings(plan: Plan, nonfinite: Iterable[str], uncorrected: list[str]) -> list[str]:
    warnings = [each for each in _kept_nonfinite(nonfinite) if each not in plan.warnings]
    warnings += plan.warnings
    if uncorrected:
        warnings.append(
            f"{plural(len(uncorrected), 'bias', 'biases')} cannot be corrected, because their "
            f'layers\' inputs do not follow from the checkpoint ("{uncorrected[0]}" is one)'
        )
    return warnings


def _kept_nonfinite(names: Iterable[str]) -> list[str]:
    return [f'"{name}" has NaN or Inf and is kept' for name in sorted(names)]


def _find_nonfinite(plan: Plan, threads: int) -> set[str]:
    """Return the names of the weights to quantise that have NaN or Inf."""
    found: set[str] = set()

    def job(tensor: SourceTensor, begin: int, end: int) -> Job:
        def run(worker: Worker) -> None:
            _, matrix, dtype = read_rows(worker, tensor, begin, end, plan.recipe.source_rounding)
            if _core.find_nonfinite(matrix, dtype, 1) is not None:
                found.add(tensor.name)

        return Job(tensor.name, (end - begin) * (tensor.nbytes // tensor.shape[0]), run)

    jobs = [
        job(planned.source, begin, end)
        for planned in plan.quantized
        for begin, end in row_chunks(planned.source)
    ]
    run_jobs(jobs, None, threads=threads)
    return found
