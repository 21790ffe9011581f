"""Export of a checkpoint to another layout or format.

Diffusers' folder, ComfyUI's file, row-wise FP8, or INT8 ConvRot.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from .. import _core
from ..checkpoint import kinds
from ..checkpoint import quantization as markers
from ..checkpoint.diffusers_config import CUSTOM_RECIPE, model_config, quantization_config
from ..checkpoint.diffusers_layout import to_diffusers_layout
from ..checkpoint.find_layers import find_layers
from ..checkpoint.foreign_files import refuse
from ..checkpoint.header import TensorInfo, file_size, layout_header
from ..checkpoint.identify import Identified, open_for
from ..checkpoint.output import AtomicFile, check_target, final_path, write_file
from ..checkpoint.output_folder import check_target_folder, new_folder
from ..checkpoint.provenance import PROVENANCE_KEY, read_provenance
from ..checkpoint.quantized_layers import QuantizedLayer, damaged
from ..checkpoint.structure import missing_or_misshapen, structure_error
from ..checks import check_threads, file_or_folder
from ..checks import path as path_argument
from ..errors import CheckpointError, InvalidArgumentError, PrecisionLossError, UsageError
from ..layout import SCALE_TILE_ROWS
from ..printing.progress import byte_bar, shown
from ..streaming.formats import FORMATS, format_of
from ..streaming.jobs import Job, ProgressCallback, copy_jobs, header_job, row_chunks, run_jobs
from ..streaming.rows import check_encoded, not_encoded, read_encoded
from ..streaming.worker import Worker
from ..text import plural
from ..zimage.config import ZImageConfig
from ..zimage.constants import HEAD_DIM

Layout = Literal["diffusers", "comfyui", "fp8-rowwise", "int8-convrot"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

_WEIGHTS = "diffusion_pytorch_model.safetensors"
_CONFIG = "config.json"
_DECODED = 1 << 21  # elements that are decoded at once
_FOLD_BOUND = 1e-3  # the largest relative error that folding may add to some rows of a layer
_Marker = Callable[..., dict[str, Any]]
_INT8 = FORMATS["int8-convrot"]


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


@dataclass(frozen=True, repr=False)
class ExportPlan:
    """An export that is decided, and not begun.

    Attributes:
        source: the checkpoint, in ComfyUI's layout.
        to: the layout.
        layers: number of quantised layers in the output.
        places: position of each tensor in the output file.
        size: bytes of the output file.
        jobs: the work.
        config: `config.json` of a folder; None for a single file.
        notes: what the output will lack of the input.
    """

    source: Identified
    to: Layout
    layers: int
    places: dict[str, TensorInfo]
    size: int
    jobs: list[Job]
    config: dict[str, Any] | None
    notes: list[str]


def plan_export(source: str | os.PathLike[str], to: Layout) -> ExportPlan:
    """Plan an export, without writing anything; reads headers and markers only.

    Raises: the errors of `export` about its input.
    """
    if to not in LAYOUTS:
        raise UsageError("to", f"must be {', '.join(LAYOUTS)}, not {repr(to)[:80]}")
    found = open_for(file_or_folder("source", source), "export")
    path = found.checkpoint.path
    if to in _ENCODED and found.format is None:
        raise refuse(path, kinds.ZIMAGE)
    own = "diffusers" if found.diffusers else "comfyui"
    if to == own:
        raise UsageError("to", f"is {to}, and {path} has that layout already")
    layers = _checked_layers(found)
    if to == "diffusers":
        return _Planner(found, layers).to_diffusers()
    if to == "comfyui":
        return _Planner(found, layers).to_comfyui()
    return _Planner(found, layers).to_encoded(to)


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
            in the layout; or, to be encoded anew, it has NaN.
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


class _Planner:
    """The layouts of a checkpoint with its MXFP8 layers."""

    def __init__(self, found: Identified, layers: list[QuantizedLayer]) -> None:
        self._found = found
        self._checkpoint, self._scope = found.checkpoint, found.scope
        self._layers = layers

    def to_comfyui(self) -> ExportPlan:
        described = self._described(markers.layer_marker)
        return self._single_file("comfyui", described, None)

    def to_encoded(self, to: Layout) -> ExportPlan:
        form = _ENCODED[to]
        return self._single_file(to, self._described(form.marker), form)

    def to_diffusers(self) -> ExportPlan:
        checkpoint = to_diffusers_layout(self._checkpoint, self._scope)
        config = self._config()
        described = {}
        for layer in self._layers:
            inner = self._scope.inner(layer.weight.name)
            parts = self._scope.table.to_diffusers(inner)
            rows, columns = layer.shape
            marker = markers.layer_marker(
                (rows // len(parts), columns), full_precision=layer.full_precision
            )
            for part in parts:
                described[part.removesuffix(markers.WEIGHT_SUFFIX)] = marker
        metadata = self._metadata(dict(sorted(described.items())))
        outputs = {
            name: (_stored_dtype(name, x.dtype), x.shape) for name, x in checkpoint.tensors.items()
        }
        header, places = layout_header(outputs, metadata)
        jobs = [header_job(header)]
        for name, info in places.items():
            jobs += copy_jobs(checkpoint.tensors[name], info.begin)
        others = sum(name not in self._scope for name in self._checkpoint.tensors)
        notes = [f"{plural(others, 'tensor')} outside the transformer left out"] if others else []
        size = file_size(header, places)
        return ExportPlan(
            self._found, "diffusers", len(described), places, size, jobs, config, notes
        )

    def _single_file(
        self, to: Layout, described: dict[str, dict[str, Any]], form: _Encoded | None
    ) -> ExportPlan:
        """Plan a file in ComfyUI's layout, with markers, with all layers encoded anew or none."""
        encoded = {x.name: x for x in self._layers} if form else {}
        written = {
            name + markers.MARKER_SUFFIX: markers.marker_bytes(marker)
            for name, marker in described.items()
        }
        outputs: dict[str, tuple[str, tuple[int, ...]]] = {
            name: (_stored_dtype(name, tensor.dtype), tensor.shape)
            for name, tensor in self._checkpoint.tensors.items()
        }
        outputs |= {name: ("U8", (len(content),)) for name, content in written.items()}
        for name, layer in encoded.items():
            assert form is not None
            outputs[name + markers.WEIGHT_SUFFIX] = form.codes(layer.shape)
            outputs[name + markers.SCALE_SUFFIX] = form.scales(layer.shape)
        metadata = self._metadata(self._header_layers(described))
        made = read_provenance(metadata)
        if made is not None and to == "int8-convrot":
            metadata[PROVENANCE_KEY] = json.dumps({**made, "format": to})
        header, places = layout_header(outputs, metadata)
        replaced = {
            name + suffix
            for name in encoded
            for suffix in (markers.WEIGHT_SUFFIX, markers.SCALE_SUFFIX)
        }
        jobs = [header_job(header)]
        for name, info in places.items():
            if name in written:
                jobs.append(_bytes_job(name, written[name], info.begin))
            elif name not in replaced:
                jobs += copy_jobs(self._checkpoint.tensors[name], info.begin)
        for name, layer in encoded.items():
            assert form is not None
            codes, scales = (
                places[name + suffix].begin
                for suffix in (markers.WEIGHT_SUFFIX, markers.SCALE_SUFFIX)
            )
            jobs += form.jobs(layer, codes, scales)
        size = file_size(header, places)
        return ExportPlan(self._found, to, len(described), places, size, jobs, None, [])

    def _described(self, marker: _Marker) -> dict[str, dict[str, Any]]:
        """Return the description of each layer, by name with prefix."""
        return {
            layer.name: marker(layer.shape, full_precision=layer.full_precision)
            for layer in self._layers
        }

    def _header_layers(self, described: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Return the descriptions for the header of a single file."""
        ours = {name for x in self._layers for name in (x.name, self._scope.inner(x.name))}
        value = self._checkpoint.metadata.get(markers.HEADER_KEY, "")
        before = markers.header_layers(value) or {}
        # With a prefix, markers are enough for ComfyUI, see `make_plan`.
        needed = not self._scope.prefix or before.keys() & ours
        others = {name: entry for name, entry in before.items() if name not in ours}
        if needed:
            others |= {name: markers.header_entry(marker) for name, marker in described.items()}
        return others

    def _metadata(self, layers: dict[str, Any]) -> dict[str, str]:
        """Return the source's metadata, with other descriptions of layers in the same place."""
        metadata = dict(self._checkpoint.metadata)
        if layers:
            metadata[markers.HEADER_KEY] = markers.header_value(layers)
        else:
            metadata.pop(markers.HEADER_KEY, None)
        return metadata

    def _config(self) -> dict[str, Any]:
        """Return `config.json`.

        Raises:
            CheckpointError: diffusers' class cannot have these sizes.
        """
        shapes = {
            inner: self._checkpoint.tensors[name].shape
            for inner, name in self._scope.inner_names(self._checkpoint.tensors).items()
        }
        shapes |= {self._scope.inner(x.weight.name): x.shape for x in self._layers}
        sizes = ZImageConfig.of_shapes(shapes)
        wanted = int(sizes.dim / 3 * 8)
        if sizes.dim % HEAD_DIM or sizes.hidden_dim not in (0, wanted):
            raise CheckpointError(
                f"{self._checkpoint.path} is {sizes.dim} wide with feed-forward layers of "
                f"{sizes.hidden_dim}, and diffusers' class needs a multiple of {HEAD_DIM} with "
                f"layers of {wanted}"
            )
        config = model_config(sizes)
        if self._layers:
            made = read_provenance(self._checkpoint.metadata) or {}
            config["quantization_config"] = quantization_config(
                str(made.get("recipe", CUSTOM_RECIPE)), made.get("exclude_layers", ())
            )
        return config


def _stored_dtype(name: str, dtype: str) -> str:
    """Return a tensor's dtype in the output: scales are U8, which every reader has."""
    return "U8" if dtype == "F8_E8M0" and name.endswith(markers.SCALE_SUFFIX) else dtype


def _bytes_job(name: str, content: bytes, position: int) -> Job:
    data = np.frombuffer(content, np.uint8)
    return Job(name, 0, lambda worker: worker.write(position, data))


def _fold_jobs(layer: QuantizedLayer, codes_begin: int, scales_begin: int) -> list[Job]:
    """Return the jobs that fold a layer and write codes [N, K] and float32 scales [N]."""
    rows, columns = layer.shape

    def job(begin: int, end: int) -> Job:
        def run(worker: Worker) -> None:
            codes, scales = read_encoded(worker, layer, begin, end)
            real = min(end, rows) - begin
            at = codes_begin + begin * columns, scales_begin + begin * 4
            folded = worker.scratch.take("folded codes", real * columns, at[0])
            row_scales = np.empty(real, np.float32)
            matrix = codes.reshape(end - begin, -1), scales.reshape(-1, layer.scale.shape[1])
            target = folded.reshape(real, columns)
            try:
                _core.fold(*matrix, real, columns, target, row_scales, _FOLD_BOUND, 1)
            except PrecisionLossError as error:
                raise PrecisionLossError(
                    f'layer "{layer.name}" cannot be folded: {error.problem}; keep it in BF16 when '
                    "you quantise the original",
                    error.relative_error,
                ) from None
            except InvalidArgumentError as error:  # NaN among the codes or scales
                raise damaged(layer.weight.segments[0].path, [layer.name], error) from None
            worker.write(at[0], folded)
            worker.write(at[1], row_scales)

        return Job(layer.weight.name, (end - begin) * layer.weight.shape[1], run)

    return [job(begin, end) for begin, end in row_chunks(layer.weight)]


def _encode_jobs(layer: QuantizedLayer, codes_begin: int, scales_begin: int) -> list[Job]:
    """Return the jobs that decode an MXFP8 layer, which is exact, and encode it in INT8."""
    rows, columns = layer.shape
    source, encoder = format_of(layer), _INT8.encoder()
    code_row, scale_row = (x(layer.shape).row_nbytes for x in (_INT8.codes, _INT8.scales))
    # Rows that are decoded at once: float32 takes four times the memory of the codes.
    step = max(1, _DECODED // (columns * SCALE_TILE_ROWS)) * SCALE_TILE_ROWS

    def encode(worker: Worker, begin: int, end: int) -> None:
        codes, scales = read_encoded(worker, layer, begin, end)
        check_encoded(layer, codes, scales)
        real = min(end, rows) - begin
        plain = worker.scratch.take("plain", real * columns * 4).view(np.uint32)
        matrix = plain.reshape(real, columns)
        source.decode(codes, scales, matrix, "float32")
        at = codes_begin + begin * code_row, scales_begin + begin * scale_row
        new_codes = worker.scratch.take("codes", real * code_row, at[0])
        new_scales = worker.scratch.take("scales", real * scale_row, at[1])
        try:
            encoder.encode(matrix, "float32", new_codes, new_scales)
        except InvalidArgumentError as error:
            raise not_encoded(layer.weight, _INT8, error) from None
        worker.write(at[0], new_codes)
        worker.write(at[1], new_scales)

    def job(begin: int, end: int) -> Job:
        def run(worker: Worker) -> None:
            for first in range(begin, end, step):
                encode(worker, first, min(first + step, end))

        return Job(layer.weight.name, (end - begin) * layer.weight.shape[1], run)

    return [job(begin, end) for begin, end in row_chunks(layer.weight)]


@dataclass(frozen=True)
class _Encoded:
    """A format in which all layers are encoded anew.

    Attributes:
        marker: returns the description of a layer [N, K].
        codes: returns dtype and shape of the codes of a layer [N, K].
        scales: the same for the scales.
        jobs: returns the jobs that encode a layer, given the places of its codes and scales.
    """

    marker: _Marker
    codes: Callable[[tuple[int, int]], tuple[str, tuple[int, ...]]]
    scales: Callable[[tuple[int, int]], tuple[str, tuple[int, ...]]]
    jobs: Callable[[QuantizedLayer, int, int], list[Job]]


_ENCODED: dict[Layout, _Encoded] = {
    "fp8-rowwise": _Encoded(
        lambda _, **flags: markers.rowwise_marker(**flags),
        lambda shape: ("F8_E4M3", shape),
        lambda shape: ("F32", shape[:1]),
        _fold_jobs,
    ),
    "int8-convrot": _Encoded(_INT8.marker, _INT8.codes, _INT8.scales, _encode_jobs),
}
