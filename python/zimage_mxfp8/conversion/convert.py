"""Converting a checkpoint to MXFP8."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .. import _core
from ..checkpoint import quantization as markers
from ..checkpoint.file_names import checkpoint_beside
from ..checkpoint.identify import Identified, open_for
from ..checkpoint.output import AtomicFile, check_distinct, check_target, write_file
from ..checkpoint.source import SourceTensor, sha256
from ..checks import check_threads, file_or_folder
from ..checks import path as path_argument
from ..dtypes import FLOAT_NAMES, SAFETENSORS_BITS, as_integers
from ..errors import Error, NonFiniteError
from ..layout import padded_shape, scale_shape
from ..printing.progress import byte_bar, shown
from ..streaming.error_stats import ErrorStats, merge_rows
from ..streaming.jobs import (
    ByteCheck,
    Job,
    ProgressCallback,
    Worker,
    byte_chunks,
    copy_jobs,
    header_job,
    row_chunks,
    run_jobs,
)
from ..streaming.rows import as_matrix, encode_rows, measure_rows, read_rows, round_to_bfloat16
from ..system.devices import cuda_index
from ..text import plural
from ..zimage.sampling import Vector
from .bias_correction import Mode, add_to_bias, correction_inputs
from .nonfinite import KeptTensorCheck
from .options import ConversionOptions, ModulationMatmul, NonFinite
from .plan import Plan, PlannedTensor, make_plan
from .recipes import DEFAULT, Recipe
from .report import ConversionReport

Bytes = npt.NDArray[np.uint8]


def default_output(source: Path) -> Path:
    """The input's name with `-mxfp8` before `.safetensors`."""
    return checkpoint_beside(source, "-mxfp8")


def plan_conversion(
    source: str | os.PathLike[str],
    *,
    recipe: str | os.PathLike[str] | Recipe = DEFAULT,
    exclude_layers: Iterable[str] = (),
    any_model: bool = False,
    nonfinite: NonFinite = "error",
    bias_correction: Mode = "timesteps",
    timesteps: str | int = "turbo",
    modulation_matmul: ModulationMatmul = "quantised",
    hash_source: bool = False,
    threads: int = 0,
) -> Plan:
    """Decide what a conversion would do, without writing anything.

    Arguments are those of `convert`, and errors those that it finds before it reads data. Reads the
    header only, or, with `nonfinite="keep"`, every weight that the recipe would quantise.
    """
    options = ConversionOptions(
        recipe=recipe,
        exclude_layers=tuple(exclude_layers),
        any_model=any_model,
        nonfinite=nonfinite,
        bias_correction=bias_correction,
        timesteps=timesteps,
        modulation_matmul=modulation_matmul,
        hash_source=hash_source,
    )
    check_threads(threads)
    found = open_for(source, "convert", any_model=any_model)
    hashes = ["0" * 64 for _ in found.checkpoint.files]  # as long as the real ones
    return _plan(found, options, hashes, threads)


def _plan(
    source: Identified, options: ConversionOptions, source_hashes: Sequence[str], threads: int
) -> Plan:
    def plan(keep_names: Collection[str]) -> Plan:
        return make_plan(
            source,
            options.rules,
            any_model=options.any_model,
            keep_names=keep_names,
            full_precision_modulations=options.modulation_matmul == "full",
            provenance=options.provenance(source_hashes),
        )

    made = plan(())
    if options.nonfinite == "keep" and (names := _find_nonfinite(made, threads)):
        made = plan(names)
        made = replace(made, warnings=(*_kept_nonfinite(names), *made.warnings))
    return made


def _kept_nonfinite(names: Iterable[str]) -> list[str]:
    return [f'"{name}" has NaN or Inf and stays as it is' for name in sorted(names)]


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    recipe: str | os.PathLike[str] | Recipe = DEFAULT,
    exclude_layers: Iterable[str] = (),
    any_model: bool = False,
    nonfinite: NonFinite = "error",
    bias_correction: Mode = "timesteps",
    timesteps: str | int = "turbo",
    calibration_samples: int = 3072,
    seed: int = 42,
    modulation_matmul: ModulationMatmul = "quantised",
    hash_source: bool = False,
    overwrite: bool = False,
    error_stats: bool = False,
    report: str | os.PathLike[str] | None = None,
    threads: int = 0,
    device: str = "cpu",
    progress: ProgressCallback | bool | None = None,
) -> ConversionReport:
    """Convert a Z-Image checkpoint to MXFP8, for ComfyUI and for this package.

    Reading, encoding and writing overlap, and memory does not grow with the checkpoint. The output
    appears whole or not at all, and depends on the input and the options alone.

    Args:
        source: a ComfyUI single file (names under any prefix or none, alone or with other models
            in the file) or a diffusers folder; BF16, F16 or F32 weights.
        output: file to write; by default the input's name with `-mxfp8` before the suffix.
        recipe: name of a built-in recipe, path of a TOML file, or a `Recipe`.
        exclude_layers: regular expressions, searched in the tensors' full names; what they match
            stays as it is, besides what the recipe keeps.
        any_model: accept a checkpoint that is not Z-Image, and quantise every 2-D weight that no
            pattern excludes.
        nonfinite: what to do with a tensor of the transformer that has NaN or Inf: "error", or
            "keep" it as it is (the weights are then read twice).
        bias_correction: "timesteps" adds what keeps a modulation's mean output over the sampler's
            timesteps; "synthetic" reproduces convert_to_quant 1.3.4 (needs torch); "none" leaves
            biases alone.
        timesteps: for "timesteps": "turbo" (8 steps), "base" (50 steps) or a number of steps.
        calibration_samples: for "synthetic": rows of random input.
        seed: for "synthetic": seed of the random numbers.
        modulation_matmul: "full" asks ComfyUI not to quantise the input of quantised modulations
            on GPUs that multiply MXFP8; it is one row per block.
        hash_source: write the SHA-256 of the source's files into the header, which means to read
            them once more. Version, recipe and correction are always written, unless the recipe
            reproduces convert_to_quant's files.
        overwrite: replace an existing output, and an existing report.
        error_stats: measure each layer's error in the same pass; see `ConversionReport.errors`.
        report: file to write the `ConversionReport` to as JSON, with each layer's error.
        threads: cores to use; 0 means all.
        device: "cpu", "cuda" or "cuda:N": where weights are encoded; the bytes are the same.
        progress: called with a `Progress` from this thread, many times a second; True draws a bar
            on a terminal.

    Returns:
        A `ConversionReport`.

    Raises:
        UsageError: options that do not go together, or the output is the input.
        RecipeError: the file is not a valid recipe.
        CheckpointError: the input is unreadable, malformed, not a whole Z-Image, or quantised
            already.
        NonFiniteError: a tensor of the transformer has NaN or Inf; the sentence names tensor, row
            and column.
        OutputError: the output cannot be written, or exists already.
        UnsupportedError: `device` is not there, or this build has no CUDA.
    """
    started = time.perf_counter()
    cuda_device = cuda_index(device)
    options = ConversionOptions(
        recipe=recipe,
        exclude_layers=tuple(exclude_layers),
        any_model=any_model,
        nonfinite=nonfinite,
        bias_correction=bias_correction,
        timesteps=timesteps,
        calibration_samples=calibration_samples,
        seed=seed,
        modulation_matmul=modulation_matmul,
        hash_source=hash_source,
    )
    check_threads(threads)
    source = file_or_folder("source", source)
    target = default_output(source) if output is None else path_argument("output", output)
    report_file = None if report is None else path_argument("report", report)
    found = open_for(source, "convert", any_model=any_model)
    hashes = [sha256(path) for path in found.checkpoint.files] if hash_source else ()
    plan = _plan(found, options, hashes, threads)
    sources = list(plan.checkpoint.inputs)
    if Path(plan.recipe.name).is_file():
        sources.append(Path(plan.recipe.name))
    check_target(target, sources, overwrite=overwrite)
    if report_file is not None:
        check_target(report_file, sources, overwrite=overwrite)
        check_distinct([target, report_file])
    if cuda_device is not None:
        # The first use of a device takes half a second: let that pass while we compute.
        with contextlib.suppress(RuntimeError):  # no more threads: then it waits
            threading.Thread(target=_wake, args=(cuda_device,)).start()
    try:
        corrections, uncorrected = correction_inputs(
            plan, bias_correction, sampler=timesteps, samples=calibration_samples, seed=seed
        )
    except NonFiniteError:  # in the embedder
        if nonfinite == "error":
            raise
        corrections, uncorrected = {}, sorted(p.layer for p in plan.quantized if p.bias)
    warnings = list(plan.warnings)
    if uncorrected:
        warnings.append(
            f"{plural(len(uncorrected), 'bias', 'biases')} cannot be corrected, because their "
            f'layers\' inputs do not follow from the checkpoint ("{uncorrected[0]}" is one)'
        )
    measure = error_stats or report is not None
    collected: dict[tuple[str, int], ErrorStats] | None = {} if measure else None
    kept = KeptTensorCheck(keep=nonfinite == "keep")
    jobs = _conversion_jobs(plan, corrections, collected, kept)
    with (
        shown(progress, byte_bar("converting")) as callback,
        AtomicFile(target, plan.size, overwrite=overwrite) as file,
    ):
        run_jobs(jobs, file, threads=threads, cuda_device=cuda_device, progress=callback)
    warnings[:0] = [told for told in _kept_nonfinite(kept.found) if told not in warnings]
    result = ConversionReport(
        input=str(source),
        output=str(target),
        recipe=plan.recipe.name,
        bias_correction=bias_correction,
        quantized=len(plan.quantized),
        kept=dict(Counter(p.reason for p in plan.tensors.values() if p.reason)),
        corrected_biases=len(corrections),
        input_bytes=plan.checkpoint.nbytes,
        output_bytes=plan.size - len(plan.header),
        file_bytes=plan.size,
        seconds=time.perf_counter() - started,
        warnings=warnings,
        notes=list(plan.notes),
        errors=None if collected is None else merge_rows(collected),
    )
    if report_file is not None:
        content = json.dumps(result.to_dict(), indent=1).encode()
        write_file(report_file, content, overwrite=overwrite)
    return result


def _wake(cuda_device: int) -> None:
    """Use a device for the first time. What fails here fails again where the device is needed."""
    with contextlib.suppress(Error):
        _core.StagedQuantizer(cuda_device)


def _conversion_jobs(
    plan: Plan,
    corrections: Mapping[str, Vector],
    collected: dict[tuple[str, int], ErrorStats] | None,
    kept: KeptTensorCheck,
) -> list[Job]:
    """The jobs that write a plan's output, in the order of the output file."""
    jobs = [header_job(plan.header)]
    corrected = {f"{layer}.bias" for layer in corrections}
    for name in sorted(plan.tensors, key=lambda name: plan.places[name].begin):
        planned = plan.tensors[name]
        if name in corrected:
            continue  # written with its layer
        if planned.action == "quantize":
            jobs += _quantize_jobs(plan, planned, corrections.get(planned.layer), collected, kept)
        elif planned.action == "cast":
            jobs += _cast_jobs(planned.source, plan.places[name].begin, kept.check)
        else:
            check = kept.check if name in plan.scope else None
            jobs += copy_jobs(planned.source, plan.places[name].begin, check)
    return jobs


def _quantize_jobs(
    plan: Plan,
    planned: PlannedTensor,
    correction: Vector | None,
    collected: dict[tuple[str, int], ErrorStats] | None,
    kept: KeptTensorCheck,
) -> list[Job]:
    tensor = planned.source
    rows, cols = tensor.shape
    codes_at = plan.places[tensor.name].begin
    scales_at = plan.places[planned.layer + markers.SCALE_SUFFIX].begin
    code_cols = padded_shape((rows, cols))[1]
    scale_cols = scale_shape((rows, cols))[1]
    marker_at = plan.places[planned.layer + markers.MARKER_SUFFIX].begin
    marker = np.frombuffer(markers.marker_bytes(plan.layers[planned.layer]), np.uint8)

    def job(begin: int, end: int) -> Job:
        def run(worker: Worker) -> None:
            positions = codes_at + begin * code_cols, scales_at + begin * scale_cols
            data, codes, scales = encode_rows(
                worker, tensor, begin, end, plan.recipe.source_rounding, positions
            )
            worker.write(positions[0], codes)
            worker.write(positions[1], scales)
            if begin == 0:
                worker.write(marker_at, marker)
            if correction is not None:
                _correct_bias(
                    worker, plan, planned, correction, kept, begin, end, data, codes, scales
                )
            if collected is not None:
                collected[tensor.name, begin] = measure_rows(
                    tensor, data, end - begin, codes, scales
                )

        return Job(tensor.name, (end - begin) * (tensor.nbytes // rows), run)

    return [job(begin, end) for begin, end in row_chunks(tensor)]


def _correct_bias(
    worker: Worker,
    plan: Plan,
    planned: PlannedTensor,
    correction: Vector,
    kept: KeptTensorCheck,
    begin: int,
    end: int,
    data: Bytes,
    codes: Bytes,
    scales: Bytes,
) -> None:
    """Write elements [begin, end) of the bias of a layer whose rows were just encoded."""
    assert planned.bias is not None
    tensor, bias = planned.source, plan.checkpoint.tensors[planned.bias]
    rows = end - begin
    change = np.empty(rows, np.float64)
    _core.residual_times_vector(
        as_matrix(tensor, data, rows),
        FLOAT_NAMES[tensor.dtype],
        codes,
        scales,
        correction,
        change,
        1,
    )
    item = bias.nbytes // bias.shape[0]
    old = worker.read(bias, begin * item, rows * item, "bias")
    kept.check(bias, begin * item, old)
    new = add_to_bias(bias, old, change)
    worker.write(plan.places[bias.name].begin + begin * item, new)


def _cast_jobs(tensor: SourceTensor, position: int, check: ByteCheck) -> list[Job]:
    """Jobs that write an F16 or F32 tensor as BF16."""
    item = SAFETENSORS_BITS[tensor.dtype] // 8

    def job(begin: int, end: int) -> Job:
        def run(worker: Worker) -> None:
            data = worker.read(tensor, begin, end - begin)
            check(tensor, begin, data)
            source = as_integers(tensor.dtype, data).reshape(1, -1)
            target, _ = round_to_bfloat16(worker, source, FLOAT_NAMES[tensor.dtype])
            worker.write(position + begin // item * 2, target)

        return Job(tensor.name, end - begin, run)

    return [job(begin, end) for begin, end in byte_chunks(tensor)]


def _find_nonfinite(plan: Plan, threads: int) -> set[str]:
    """Names of the weights to be quantised that have NaN or Inf."""
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
