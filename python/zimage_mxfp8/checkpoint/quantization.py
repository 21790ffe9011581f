"""Descriptions of quantised layers in a file: `comfy_quant` tensors and header metadata.

Sources: convert_to_quant 1.3.4, comfy-kitchen 0.2.40 and ComfyUI 0.33. ComfyUI reads `format` and
`full_precision_matrix_mult` only, and prefers the header where both describe a layer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import kinds
from .kinds import Kind
from .scopes import Scope
from .source import Checkpoint, SourceTensor, TensorReader

HEADER_KEY = "_quantization_metadata"
MARKER_SUFFIX = ".comfy_quant"
SCALE_SUFFIX = ".weight_scale"
WEIGHT_SUFFIX = ".weight"
FULL_PRECISION_KEY = "full_precision_matrix_mult"
MXFP8_FORMAT = "mxfp8"
SCALE_DTYPES = ("U8", "F8_E8M0")
INT8_FORMAT = "int8_tensorwise"  # with one scale per tensor or, as here, per row
ROTATED_KEY = "convrot"
GROUP_KEY = "convrot_groupsize"
ROWWISE_FORMAT = "float8_e4m3fn_rowwise"  # convert_to_quant's name

_MARKER_LIMIT = 4096  # bytes; a marker has about 100
_FLOAT8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0")
_PER_ROW_KEY = "per_row"
# Tensors that quantised layers of any format have beside their weight.
_BESIDE_WEIGHTS = (
    MARKER_SUFFIX,
    SCALE_SUFFIX,
    ".weight_scale_2",
    ".scale_weight",
    ".scale_input",
    ".input_scale",
)
_SCALED_FP8 = "scaled_fp8"  # a tensor that older ComfyUI files have next to the model's
_KINDS = {
    MXFP8_FORMAT: kinds.MXFP8,
    INT8_FORMAT: kinds.INT8_CONVROT,
    ROWWISE_FORMAT: kinds.ROWWISE_FP8,
    "nvfp4": kinds.NVFP4,
    "float8_e4m3fn": kinds.SCALED_FP8,
    "float8_e5m2": kinds.SCALED_FP8,
}


def layer_marker(shape: tuple[int, int], *, full_precision: bool = False) -> dict[str, Any]:
    """Return the description of an MXFP8 layer, for its `comfy_quant` tensor and the header.

    The dtype in it is the one to compute in; it is bfloat16 for every type of the source, as
    convert_to_quant writes it.

    Args:
        shape: [N, K] before padding.
        full_precision: ask ComfyUI to decode this layer's weight and not to quantise its input,
            also on devices that multiply MXFP8.
    """
    marker: dict[str, Any] = {
        "format": MXFP8_FORMAT,
        "group_size": 32,
        "orig_dtype": "torch.bfloat16",
        "orig_shape": list(shape),
    }
    return marker | ({FULL_PRECISION_KEY: True} if full_precision else {})


def rowwise_marker(*, full_precision: bool = False) -> dict[str, Any]:
    """Return the description of a layer in FP8 with one scale per row, as convert_to_quant does.

    Args:
        full_precision: ask readers not to quantise the layer's input.
    """
    marker: dict[str, Any] = {"format": ROWWISE_FORMAT, "orig_dtype": "torch.bfloat16"}
    return marker | ({FULL_PRECISION_KEY: True} if full_precision else {})


def int8_marker(group: int, *, full_precision: bool = False) -> dict[str, Any]:
    """Return the description of an INT8 layer with one scale per row, as convert_to_quant does.

    Args:
        group: columns that are rotated together; 1 if the layer is not rotated.
        full_precision: ask readers not to quantise the layer's input.
    """
    marker: dict[str, Any] = {"format": INT8_FORMAT, "orig_dtype": "torch.bfloat16"}
    if full_precision:
        marker[FULL_PRECISION_KEY] = True
    if group > 1:
        marker |= {ROTATED_KEY: True, GROUP_KEY: group}
    return marker | {_PER_ROW_KEY: True}


def header_entry(marker: Mapping[str, Any]) -> dict[str, Any]:
    """Return the description of a layer in the header for that in its `comfy_quant` tensor.

    convert_to_quant writes whether there is a scale per row in the tensor only.
    """
    return {key: value for key, value in marker.items() if key != _PER_ROW_KEY}


def marker_bytes(marker: Mapping[str, Any]) -> bytes:
    """Return the content of a `comfy_quant` tensor."""
    return json.dumps(marker).encode()


def header_value(markers: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the header's `_quantization_metadata`; `markers` by layer name, in name order."""
    return json.dumps({"format_version": "1.0", "layers": markers})


def header_layers(value: str) -> dict[str, Any] | None:
    """Return the layers in a header's `_quantization_metadata`, or None for another layout."""
    try:
        document = json.loads(value)
    except (ValueError, RecursionError):
        return None
    layers = document.get("layers") if isinstance(document, dict) else None
    return layers if isinstance(layers, dict) else None


@dataclass(frozen=True)
class Description:
    """Description of one layer in a file.

    Attributes:
        marker: the object in its `comfy_quant` tensor; None if there is no such tensor, or it
            cannot be read.
        header: its entry in the header; None without one.
        unreadable: why the `comfy_quant` tensor cannot be read; "" if it can, or is missing.
    """

    marker: dict[str, Any] | None
    header: dict[str, Any] | None
    unreadable: str = ""

    @property
    def believed(self) -> dict[str, Any] | None:
        """The description that ComfyUI uses."""
        return self.marker if self.header is None else self.header

    @property
    def full_precision(self) -> bool:
        """Whether the layer's input must not be quantised."""
        return bool((self.believed or {}).get(FULL_PRECISION_KEY))


@dataclass(frozen=True)
class Descriptions:
    """Descriptions of the quantised layers of a model in a file.

    Attributes:
        layers: by layer name, with prefix.
        header_problem: why the header's metadata cannot be read; "" if it can, or is missing.
    """

    layers: dict[str, Description]
    header_problem: str = ""


def read_descriptions(checkpoint: Checkpoint, scope: Scope) -> Descriptions:
    """Read the markers and the header's metadata of a model's layers.

    The header may name layers with or without the prefix: ComfyUI takes both.

    Raises:
        CheckpointError: a file cannot be read.
    """
    headers: dict[str, dict[str, Any]] = {}
    problem = ""
    text = checkpoint.metadata.get(HEADER_KEY)
    if text is not None:
        layers = header_layers(text)
        if layers is None:
            problem = 'is not {"layers": {...}} in JSON'
        for name, entry in (layers or {}).items():
            layer = _layer_in_scope(checkpoint, scope, name)
            if layer is None:
                continue  # another model's
            if isinstance(entry, dict):
                headers[layer] = entry
            else:
                problem = f'has an entry "{name}" that is not a JSON object'
    found: dict[str, Description] = {}
    with TensorReader() as reader:
        for name, tensor in checkpoint.tensors.items():
            if name.endswith(MARKER_SUFFIX) and name in scope:
                layer = name.removesuffix(MARKER_SUFFIX)
                marker, unreadable = _read_marker(tensor, reader)
                found[layer] = Description(marker, headers.get(layer), unreadable)
    for layer, entry in headers.items():
        found.setdefault(layer, Description(None, entry))
    return Descriptions(found, problem)


def _layer_in_scope(checkpoint: Checkpoint, scope: Scope, name: str) -> str | None:
    """Return the layer of the model that a name in the header means, with the prefix."""
    candidates = [layer for layer in (name, scope.prefix + name) if layer in scope]
    for layer in candidates:
        if layer + WEIGHT_SUFFIX in checkpoint.tensors:
            return layer
    return candidates[0] if candidates else None


def _read_marker(tensor: SourceTensor, reader: TensorReader) -> tuple[dict[str, Any] | None, str]:
    if tensor.dtype != "U8" or len(tensor.shape) != 1 or tensor.nbytes > _MARKER_LIMIT:
        return None, f"is {tensor.dtype} {list(tensor.shape)}, not a short list of U8"
    try:
        marker = json.loads(reader.read(tensor).tobytes())
    except (ValueError, RecursionError):
        return None, "is not JSON"
    if not isinstance(marker, dict):
        return None, "is not a JSON object"
    return marker, ""


def find_format(checkpoint: Checkpoint, scope: Scope) -> tuple[Kind, str] | None:
    """Return the format that a model is quantised with, and the tensor or header key that shows it.

    None if it is not quantised. Tensors outside the scope (a text encoder in the same file) do not
    count.

    Raises:
        CheckpointError: a file cannot be read.
    """
    names = sorted(name for name in checkpoint.tensors if name in scope)
    for name in names:
        if name.endswith(".weight_scale_2"):
            return kinds.NVFP4, name
    descriptions = read_descriptions(checkpoint, scope)
    if formats := {
        name: _KINDS.get(str(entry.get("format")), kinds.OTHER_FORMAT)
        for name, description in sorted(descriptions.layers.items())
        if (entry := description.believed) is not None
    }:
        name = min(formats)
        by_header = descriptions.layers[name].header is not None
        kind = formats[name]
        if len(set(formats.values())) > 1:
            mixed = kinds.MXFP8 in formats.values()
            kind = kinds.MXFP8_AND_OTHERS if mixed else kinds.SEVERAL_FORMATS
        return kind, HEADER_KEY if by_header else name + MARKER_SUFFIX
    if descriptions.header_problem:
        return kinds.OTHER_FORMAT, HEADER_KEY
    if descriptions.layers:  # with markers that cannot be read
        name = min(descriptions.layers)
        is_mxfp8 = _has_block_scales(checkpoint, name)
        return (kinds.MXFP8 if is_mxfp8 else kinds.OTHER_FORMAT), name + MARKER_SUFFIX
    if scope.prefix + _SCALED_FP8 in checkpoint.tensors:
        return kinds.SCALED_FP8, scope.prefix + _SCALED_FP8
    for name in names:
        is_token = scope.inner(name) in scope.table.tokens
        if (by_dtype := _format_by_dtype(checkpoint, name, is_token)) is not None:
            return by_dtype, name
    return None


def is_scale(checkpoint: Checkpoint, name: str) -> bool:
    """Return whether a tensor of a quantised model is a scale or marker of one of its layers."""
    layer = next((name.removesuffix(x) for x in _BESIDE_WEIGHTS if name.endswith(x)), None)
    return layer is not None and layer + WEIGHT_SUFFIX in checkpoint.tensors


def _has_block_scales(checkpoint: Checkpoint, layer: str) -> bool:
    scale = checkpoint.tensors.get(layer + SCALE_SUFFIX)
    return scale is not None and scale.dtype in SCALE_DTYPES and len(scale.shape) == 2


def _format_by_dtype(checkpoint: Checkpoint, name: str, is_token: bool) -> Kind | None:
    dtype = checkpoint.tensors[name].dtype
    layer = name.removesuffix(WEIGHT_SUFFIX)
    if name.endswith(".scale_weight"):
        return kinds.SCALED_FP8
    if name.endswith((".absmax", ".qweight", ".wscales")):
        return kinds.FOUR_BIT
    if dtype in _FLOAT8 and (is_token or name.endswith((WEIGHT_SUFFIX, ".bias"))):
        if _has_block_scales(checkpoint, layer):
            return kinds.MXFP8
        scales = (layer + SCALE_SUFFIX, layer + ".scale_weight")
        return kinds.SCALED_FP8 if any(s in checkpoint.tensors for s in scales) else kinds.FP8
    if name.endswith(WEIGHT_SUFFIX) and dtype in ("I8", "U8", "F4"):
        return kinds.INT8 if dtype == "I8" else kinds.FOUR_BIT
    return None
