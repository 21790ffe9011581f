"""Export of a checkpoint to another layout or format, see `export_layouts` and `export_formats`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import kinds
from ..checkpoint.find_layers import find_layers
from ..checkpoint.foreign_files import refuse
from ..checkpoint.identify import Identified, open_for
from ..checkpoint.output import AtomicFile, check_target, final_path, write_file
from ..checkpoint.output_folder import check_target_folder, new_folder
from ..checkpoint.quantized_layers import QuantizedLayer
from ..checkpoint.structure import missing_or_misshapen, structure_error
from ..checks import check_threads, file_or_folder
from ..checks import path as path_argument
from ..errors import UsageError
from ..printing.progress import byte_bar, shown
from ..streaming.jobs import ProgressCallback, run_jobs
from ..text import plural
from .export_formats import ENCODED
from .export_layouts import LAYOUTS, ExportPlan, Layout, plan_layout

_WEIGHTS = "diffusion_pytorch_model.safetensors"
_CONFIG = "config.json"


@dataclass(repr=False)
class ExportReport:
    """What `export` did.

    Attributes:
        input: path that was read.
        output: file or folder that was written.
        to: the layout.
        layers: number of quantised layers in the output.
        tensors: number of tensors in the output.
        file_bytes: bytes of the safetensors file.
        seconds: wall time.
        notes: what the output lacks of the input.
    """

    input: str
    output: str
    to: Layout
    layers: int
    tensors: int
    file_bytes: int
    seconds: float
    notes: list[str]

    def __repr__(self) -> str:
        count = plural(self.layers, "layer")
        return f"ExportReport({self.output!r}, {self.to}, {count}, {self.file_bytes:,} bytes)"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dict(vars(self))


def plan_export(source: str | os.PathLike[str], to: Layout) -> ExportPlan:
    """Plan an export, without writing anything; reads headers and markers only.

    Raises: the errors of `export` about its input.
    """
    if to not in LAYOUTS:
        raise UsageError("to", f"must be {', '.join(LAYOUTS)}, not {repr(to)[:80]}")
    found = open_for(file_or_folder("source", source), "export")
    path = found.checkpoint.path
    if to in ENCODED and found.format is None:
        raise refuse(path, kinds.ZIMAGE)
    own = "diffusers" if found.diffusers else "comfyui"
    if to == own:
        raise UsageError("to", f"is {to}, and {path} has that layout already", "choose another")
    layers = _checked_layers(found)
    return plan_layout(found, layers, to)


def export(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    to: Layout,
    *,
    overwrite: bool = False,
    threads: int = 0,
    progress: ProgressCallback | bool | None = None,
) -> ExportReport:
    """Write a checkpoint in another layout, with its scales and descriptions of layers.

        zm.export("z_image_turbo-mxfp8.safetensors", "Z-Image-mxfp8/transformer", "diffusers")

    "diffusers" and "comfyui" move bytes and change no number: a file that `convert` wrote comes
    back byte for byte. "fp8-rowwise" folds the block scales of each row into one float32 scale,
    and writes codes [N, K], scales [N] and markers "float8_e4m3fn_rowwise" as convert_to_quant
    does, in ComfyUI's layout. "int8-convrot" decodes the weights and encodes them as
    `convert(..., format="int8-convrot")` would.

    Args:
        source: a Z-Image checkpoint, MXFP8 or plain: a file or a diffusers folder.
        output: the file to write; for "diffusers" the transformer's folder.
        to: the layout.
        overwrite: replace an existing output.
        threads: cores to use; 0 means all.
        progress: called with a `Progress` from this thread; True draws a bar on a terminal.

    Returns:
        An `ExportReport`.

    Raises:
        UsageError: an argument of the wrong type, the output is the input, or the input has the
            layout already.
        CheckpointError: the input is not a whole Z-Image, breaks the file contract, or has no place
            in the layout; or a quantised layer has NaN among its codes or scales.
        PrecisionLossError: folding would change a layer by more than 0.1 %.
        OutputError: the output cannot be written, or exists already.
    """
    started = time.perf_counter()
    check_threads(threads)
    target = path_argument("output", output)
    plan = plan_export(source, to)
    with (
        shown(progress, byte_bar("exporting")) as callback,
        _file_to_write(plan, target, overwrite) as path,
        AtomicFile(path, plan.size, overwrite=overwrite, named=target) as file,
    ):
        run_jobs(plan.jobs, file, threads=threads, progress=callback)
    return ExportReport(
        input=str(plan.source.checkpoint.path),
        output=str(target),
        to=plan.to,
        layers=plan.layers,
        tensors=len(plan.places),
        file_bytes=plan.size,
        seconds=time.perf_counter() - started,
        notes=plan.notes,
    )


@contextmanager
def _file_to_write(plan: ExportPlan, target: Path, overwrite: bool) -> Iterator[Path]:
    """Yield the safetensors file to write: the output itself, or one in a new folder."""
    inputs = plan.source.checkpoint.inputs
    if plan.config is None:
        check_target(target, inputs, overwrite=overwrite)
        yield target
        return
    own = (_CONFIG, _WEIGHTS)
    check_target_folder(target, own, overwrite=overwrite)
    # By any spelling: a link inside the folder would vanish with it too.
    places = [place for path in inputs for place in (path.absolute(), path.resolve())]
    if any(final_path(target) in {p.resolve() for p in place.parents} for place in places):
        raise UsageError("output", f"{target} holds the input", "choose another name")
    with new_folder(target, own, overwrite=overwrite) as folder:
        content = json.dumps(plan.config, indent=2, sort_keys=True) + "\n"
        write_file(folder / _CONFIG, content.encode(), overwrite=False)
        yield folder / _WEIGHTS


def _checked_layers(found: Identified) -> list[QuantizedLayer]:
    checkpoint, scope = found.checkpoint, found.scope
    quantized = find_layers(found)
    quantized.require_sound(checkpoint.path)
    padded = {layer.weight.name: layer.shape for layer in quantized.layers}
    if problems := missing_or_misshapen(checkpoint, scope, padded, for_comfyui=False):
        raise structure_error(checkpoint, scope, problems)
    return quantized.layers
