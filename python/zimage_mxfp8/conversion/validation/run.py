"""`validate`: the checks of a file, in order."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import safetensors

from ...checkpoint import quantization as markers
from ...checkpoint.find_layers import find_layers
from ...checkpoint.header import read_header
from ...checkpoint.identify import Identified, open_for
from ...checkpoint.provenance import merged_loras
from ...checkpoint.quantized_layers import AGAIN, Breach, QuantizedLayer, QuantizedLayers
from ...checkpoint.scopes import COMFYUI_PREFIXES
from ...checkpoint.source import Checkpoint
from ...checkpoint.structure import missing_or_misshapen, unknown_weights
from ...errors import CheckpointError, UsageError, WrongKindError
from ...printing.progress import byte_bar, shown
from ...streaming.jobs import Job, ProgressCallback, run_jobs
from ...text import plural
from ..merging import Merge
from ..options import AnyPath, weighted_files
from .comparison import Comparison
from .report import ValidationReport
from .scans import DataScan, KeptScan


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
    scan = DataScan()
    comparison = None
    jobs: list[Job] = []
    scanned: set[str] = set()
    if original is not None:
        comparison = Comparison(checkpoint, layers, original, report, scan)
        jobs = comparison.jobs()
        scanned = comparison.compared
    for layer in layers:
        if layer.name not in scanned:
            jobs += scan.jobs(layer)
    kept = KeptScan(found, layers, report)
    jobs += kept.jobs()
    with shown(progress, byte_bar("checking")) as callback:
        run_jobs(jobs, None, threads=threads, progress=callback)
    flaws = scan.flaws()
    report.notes += scan.notes()
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
    merged = merged_loras(checkpoint.metadata)
    before = merged_loras(found.checkpoint.metadata)
    if merged[: len(before)] == before:
        merged = merged[len(before) :]
    else:
        report.notes.append(
            "the original has adapters merged in that the file's header does not name, so "
            "differences may come from that"
        )
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
    if [adapter.identity for adapter in merge.adapters] != merged:
        report.notes.append(
            "these are not the adapters and weights that the file's header names, in that order, "
            "so differences may come from that"
        )
    return merge.apply({layer.weight.name for layer in layers})


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
