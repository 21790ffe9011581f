"""The layouts that `export` writes: which tensors, descriptions and metadata a file has, and where.

Diffusers' folder, ComfyUI's file, and files in ComfyUI's layout whose layers are encoded anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..checkpoint import quantization as markers
from ..checkpoint.diffusers_config import CUSTOM_RECIPE, model_config, quantization_config
from ..checkpoint.diffusers_layout import to_diffusers_layout
from ..checkpoint.header import TensorInfo, file_size, layout_header
from ..checkpoint.identify import Identified
from ..checkpoint.provenance import PROVENANCE_KEY, read_provenance
from ..checkpoint.quantized_layers import QuantizedLayer
from ..errors import CheckpointError
from ..streaming.jobs import ByteCheck, Job, copy_jobs, header_job
from ..streaming.rows import check_encoded
from ..text import plural
from ..zimage.config import ZImageConfig
from ..zimage.constants import HEAD_DIM
from .export_formats import ENCODED, Encoding

Layout = Literal["diffusers", "comfyui", Encoding]
LAYOUTS: tuple[Layout, ...] = ("diffusers", "comfyui", *ENCODED)


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


def plan_layout(found: Identified, layers: list[QuantizedLayer], to: Layout) -> ExportPlan:
    """Plan the output in a layout.

    Args:
        found: the checkpoint, in ComfyUI's layout.
        layers: its MXFP8 layers.
        to: the layout, in which the checkpoint is not yet.

    Raises:
        CheckpointError: there is no place for the checkpoint in the layout.
    """
    planner = _Planner(found, layers)
    return planner.to_diffusers() if to == "diffusers" else planner.to_single_file(to)


class _Planner:
    """The layouts of a checkpoint with its MXFP8 layers."""

    def __init__(self, found: Identified, layers: list[QuantizedLayer]) -> None:
        self._found = found
        self._checkpoint, self._scope = found.checkpoint, found.scope
        self._layers = layers

    def to_diffusers(self) -> ExportPlan:
        """Plan the folder of a transformer."""
        checkpoint = to_diffusers_layout(self._checkpoint, self._scope)
        config = self._config()
        described = {}
        checks: dict[str, ByteCheck] = {}
        for layer in self._layers:
            inner = self._scope.inner(layer.weight.name)
            parts = self._scope.table.to_diffusers(inner)
            rows, columns = layer.shape
            marker = markers.layer_marker(
                (rows // len(parts), columns), full_precision=layer.full_precision
            )
            for part in parts:
                name = part.removesuffix(markers.WEIGHT_SUFFIX)
                described[name] = marker
                checks[part], checks[name + markers.SCALE_SUFFIX] = _checks(layer)
        metadata = self._metadata(dict(sorted(described.items())))
        outputs = {
            name: (_stored_dtype(name, x.dtype), x.shape) for name, x in checkpoint.tensors.items()
        }
        header, places = layout_header(outputs, metadata)
        jobs = [header_job(header)]
        for name, info in places.items():
            jobs += copy_jobs(checkpoint.tensors[name], info.begin, checks.get(name))
        others = sum(name not in self._scope for name in self._checkpoint.tensors)
        notes = [f"{plural(others, 'tensor')} outside the transformer left out"] if others else []
        size = file_size(header, places)
        return ExportPlan(
            self._found, "diffusers", len(described), places, size, jobs, config, notes
        )

    def to_single_file(self, to: Literal["comfyui", Encoding]) -> ExportPlan:
        """Plan a file in ComfyUI's layout, with markers, with all layers encoded anew or none."""
        form = None if to == "comfyui" else ENCODED[to]
        described = self._described(markers.layer_marker if form is None else form.marker)
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
        checks: dict[str, ByteCheck] = {}
        for layer in self._layers:
            checks[layer.weight.name], checks[layer.scale.name] = _checks(layer)
        jobs = [header_job(header)]
        for name, info in places.items():
            if name in written:
                jobs.append(_bytes_job(name, written[name], info.begin))
            elif name not in replaced:
                jobs += copy_jobs(self._checkpoint.tensors[name], info.begin, checks.get(name))
        for name, layer in encoded.items():
            assert form is not None
            codes, scales = (
                places[name + suffix].begin
                for suffix in (markers.WEIGHT_SUFFIX, markers.SCALE_SUFFIX)
            )
            jobs += form.jobs(layer, codes, scales)
        size = file_size(header, places)
        return ExportPlan(self._found, to, len(described), places, size, jobs, None, [])

    def _described(self, marker: Callable[..., dict[str, Any]]) -> dict[str, dict[str, Any]]:
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
                f"layers of {wanted}; leave it in ComfyUI's layout"
            )
        config = model_config(sizes)
        if self._layers:
            made = read_provenance(self._checkpoint.metadata) or {}
            config["quantization_config"] = quantization_config(
                str(made.get("recipe", CUSTOM_RECIPE)), made.get("exclude_layers", ())
            )
        return config


def _checks(layer: QuantizedLayer) -> tuple[ByteCheck, ByteCheck]:
    """Return the checks of the codes and of the scales of a layer while they are copied."""
    nothing = np.empty(0, np.uint8)
    return (
        lambda _tensor, _begin, codes: check_encoded(layer, codes, nothing),
        lambda _tensor, _begin, scales: check_encoded(layer, nothing, scales),
    )


def _stored_dtype(name: str, dtype: str) -> str:
    """Return a tensor's dtype in the output: scales are U8, which every reader has."""
    return "U8" if dtype == "F8_E8M0" and name.endswith(markers.SCALE_SUFFIX) else dtype


def _bytes_job(name: str, content: bytes, position: int) -> Job:
    data = np.frombuffer(content, np.uint8)
    return Job(name, 0, lambda worker: worker.write(position, data))
