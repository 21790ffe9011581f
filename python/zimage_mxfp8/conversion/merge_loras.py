"""Merging adapters into a checkpoint that stays plain."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.header import file_size, layout_header
from ..checkpoint.identify import open_for
from ..checkpoint.output import AtomicFile, check_target
from ..checkpoint.provenance import merged_loras, provenance_of_merged
from ..checks import check_threads, file_or_folder
from ..checks import path as path_argument
from ..errors import UsageError
from ..printing.progress import byte_bar, shown
from ..streaming.jobs import ProgressCallback, copy_jobs, header_job, run_jobs
from ..text import plural
from .merging import Merge
from .nonfinite import KeptTensorCheck
from .options import AnyPath, weighted_files
from .plan import check_structure


@dataclass(repr=False)
class MergeReport:
    """What `merge_loras` did.

    Attributes:
        input: path that was read.
        output: path that was written.
        loras: the adapters: path, weight, SHA-256, number of layers, kinds, and names of tensors
            that fit nothing.
        changed: number of tensors that differ from the input's.
        file_bytes: bytes of the output file.
        seconds: wall time.
        warnings: sentences that the user should see.
        notes: what counts once though it is in an adapter twice.
    """

    input: str
    output: str
    loras: list[dict[str, Any]]
    changed: int
    file_bytes: int
    seconds: float
    warnings: list[str]
    notes: list[str]

    def __repr__(self) -> str:
        count = plural(self.changed, "tensor")
        return f"MergeReport({self.output!r}, {count} changed, {self.file_bytes:,} bytes)"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dict(vars(self))


def merge_loras(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    loras: Iterable[AnyPath | tuple[AnyPath, float]],
    *,
    overwrite: bool = False,
    threads: int = 0,
    progress: ProgressCallback | bool | None = None,
) -> MergeReport:
    """Write a plain checkpoint with adapters merged into its weights.

        zm.merge_loras("z_image_bf16.safetensors", "merged.safetensors", [("a.safetensors", 0.8)])

    Every tensor keeps its dtype: `W + sum(weight * dW)` is rounded to nearest, ties to even. The
    output is a single file in ComfyUI's layout, and appears whole or not at all. Its header names
    the adapters by SHA-256 and weight, after those that were merged into the source.

    Args:
        source: a Z-Image checkpoint in BF16, F16 or F32 (file or diffusers folder).
        output: file to write.
        loras: files, or pairs of a file and a weight (1 by default, may be negative).
        overwrite: replace an existing output.
        threads: cores to use; 0 means all.
        progress: called with a `Progress` from this thread; True draws a bar on a terminal.

    Returns:
        A `MergeReport`.

    Raises:
        UsageError: no adapter, an argument of the wrong type, or the output is an input.
        CheckpointError: the checkpoint is not a whole Z-Image in plain weights, or an adapter is
            unreadable or does not fit.
        NonFiniteError: a tensor of the transformer has NaN or Inf.
        OutputError: the output cannot be written, or exists already.
    """
    started = time.perf_counter()
    check_threads(threads)
    target = path_argument("output", output)
    pairs = weighted_files(loras)
    if not pairs:
        raise UsageError("loras", "must name an adapter")
    found = open_for(file_or_folder("source", source), "merge")
    check_target(
        target, [*found.checkpoint.inputs, *(path for path, _ in pairs)], overwrite=overwrite
    )
    check_structure(found)
    merge = Merge(found, pairs)
    checkpoint = merge.apply(())
    outputs = {name: (tensor.dtype, tensor.shape) for name, tensor in checkpoint.tensors.items()}
    before = merged_loras(checkpoint.metadata)
    made = provenance_of_merged([*before, *(each.identity for each in merge.adapters)])
    header, places = layout_header(outputs, {**checkpoint.metadata, **made})
    check = KeptTensorCheck(keep=False).check
    jobs = [header_job(header)]
    for name, info in places.items():
        own = check if name in found.scope else None
        jobs += copy_jobs(checkpoint.tensors[name], info.begin, own)
    size = file_size(header, places)
    with (
        shown(progress, byte_bar("merging")) as callback,
        AtomicFile(target, size, overwrite=overwrite) as file,
    ):
        run_jobs(jobs, file, threads=threads, progress=callback)
    return MergeReport(
        input=str(Path(source)),
        output=str(target),
        loras=[adapter.to_dict() for adapter in merge.adapters],
        changed=merge.changed,
        file_bytes=size,
        seconds=time.perf_counter() - started,
        warnings=merge.warnings,
        notes=merge.notes,
    )
