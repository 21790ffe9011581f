"""Decoding of a quantised checkpoint to a plain BF16 one."""

from __future__ import annotations

import os

import numpy as np

from ..checkpoint import quantization as markers
from ..checkpoint.find_layers import find_layers
from ..checkpoint.header import file_size, layout_header
from ..checkpoint.identify import open_for
from ..checkpoint.output import AtomicFile, check_target
from ..checkpoint.provenance import PROVENANCE_KEY, merged_loras, provenance_of_merged
from ..checkpoint.quantized_layers import QuantizedLayer
from ..checks import path as path_argument
from ..printing.progress import byte_bar, shown
from ..streaming.formats import format_of
from ..streaming.jobs import (
    Job,
    ProgressCallback,
    copy_jobs,
    header_job,
    row_chunks,
    run_jobs,
)
from ..streaming.rows import check_encoded, read_encoded
from ..streaming.worker import Worker


def dequantize_checkpoint(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    threads: int = 0,
    progress: ProgressCallback | bool | None = None,
) -> None:
    """Write the checkpoint that an MXFP8 or INT8 ConvRot file encodes, with plain BF16 weights.

    Padding, scales and markers are removed, everything else is copied (corrected biases stay
    corrected: they belong to the rounded weights).

    Args:
        source: the quantised file.
        output: file to write.
        overwrite: replace an existing output.
        threads: cores to use; 0 means all.
        progress: called with a `Progress` from this thread; True draws a bar on a terminal.

    Raises:
        CheckpointError: the input is unreadable, is not quantised, breaks the contract, or has
            codes or scales that no encoder writes, such as NaN or negative scales of INT8.
        UsageError: the output is the input.
        OutputError: the output cannot be written, or exists already.
    """
    target = path_argument("output", output)
    found = open_for(source, "dequantize")
    checkpoint = found.checkpoint
    check_target(target, checkpoint.inputs, overwrite=overwrite)
    quantized = find_layers(found)
    quantized.require_sound(source)
    layers = quantized.layers

    weights = {layer.weight.name: layer for layer in layers}
    dropped = {layer.scale.name for layer in layers} | {
        layer.name + markers.MARKER_SUFFIX for layer in layers
    }
    outputs = {
        name: ("BF16", weights[name].shape) if name in weights else (tensor.dtype, tensor.shape)
        for name, tensor in checkpoint.tensors.items()
        if name not in dropped
    }
    metadata = dict(checkpoint.metadata)
    names = {name for layer in layers for name in (layer.name, found.scope.inner(layer.name))}
    metadata.pop(PROVENANCE_KEY, None)
    metadata |= provenance_of_merged(merged_loras(checkpoint.metadata))
    described = markers.header_layers(metadata.pop(markers.HEADER_KEY, "")) or {}
    if others := {name: layer for name, layer in described.items() if name not in names}:
        metadata[markers.HEADER_KEY] = markers.header_value(others)
    header, places = layout_header(outputs, metadata)
    jobs = [header_job(header)]
    for name, info in places.items():
        if name in weights:
            jobs += _decode_jobs(weights[name], info.begin)
        else:
            jobs += copy_jobs(checkpoint.tensors[name], info.begin)
    with (
        shown(progress, byte_bar("decoding")) as callback,
        AtomicFile(target, file_size(header, places), overwrite=overwrite) as file,
    ):
        run_jobs(jobs, file, threads=threads, progress=callback)


def _decode_jobs(layer: QuantizedLayer, position: int) -> list[Job]:
    rows, cols = layer.shape
    form = format_of(layer)

    def job(begin: int, end: int) -> Job:
        def run(worker: Worker) -> None:
            codes, scales = read_encoded(worker, layer, begin, end)
            check_encoded(layer, codes, scales)
            real = min(end, rows) - begin
            at = position + begin * cols * 2
            plain = worker.scratch.take("plain", real * cols * 2, at)
            matrix = plain.view(np.uint16).reshape(real, cols)
            form.decode(codes, scales, matrix, "bfloat16")
            worker.write(at, plain)

        return Job(layer.weight.name, (end - begin) * layer.weight.shape[1], run)

    # Padding never fills a chunk of its own: it is less than 32 rows, and chunks end at 128.
    return [job(begin, end) for begin, end in row_chunks(layer.weight)]
