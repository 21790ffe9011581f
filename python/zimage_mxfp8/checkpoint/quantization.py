"""The quantisation markers in a checkpoint: which layers are MXFP8, and what else there is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .source import Checkpoint

HEADER_KEY = "_quantization_metadata"
MARKER_SUFFIX = ".comfy_quant"
SCALE_SUFFIX = ".weight_scale"
WEIGHT_SUFFIX = ".weight"

_FLOAT8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")


def layer_marker(shape: tuple[int, int]) -> dict[str, Any]:
    """The object that describes an MXFP8 layer to ComfyUI; `shape` is [N, K] before padding.

    Both in the layer's `comfy_quant` tensor and in the header. The dtype is the one to compute
    in; it is bfloat16 whatever the source's type, as convert_to_quant writes it.
    """
    return {
        "format": "mxfp8",
        "group_size": 32,
        "orig_dtype": "torch.bfloat16",
        "orig_shape": list(shape),
    }


def marker_bytes(marker: Mapping[str, Any]) -> bytes:
    """Content of a `comfy_quant` tensor."""
    return json.dumps(marker).encode()


def header_value(markers: Mapping[str, Mapping[str, Any]]) -> str:
    """Value of the header's `_quantization_metadata`; `markers` by layer name, in name order."""
    return json.dumps({"format_version": "1.0", "layers": markers})


def quantized_format(checkpoint: Checkpoint, prefix: str) -> tuple[str, str] | None:
    """What the transformer in a checkpoint is quantised with already, or None.

    Tensors outside `prefix` (a text encoder in an all-in-one file) do not count.

    Returns:
        The format's name, and the tensor or header key that shows it.
    """
    names = {name for name in checkpoint.tensors if name.startswith(prefix)}
    markers = sorted(name for name in names if name.endswith(MARKER_SUFFIX))
    for name in sorted(names):
        if name.endswith(".weight_scale_2"):
            return "NVFP4", name
    if HEADER_KEY in checkpoint.metadata:
        layers = header_layers(checkpoint.metadata[HEADER_KEY])
        if layers is None:
            return "ComfyUI quantised", HEADER_KEY
        formats = {_format_of(layers[name]) for name in layers if name.startswith(prefix)}
        if formats:
            return " and ".join(sorted(formats)), HEADER_KEY
    if markers:
        scale = markers[0].removesuffix(MARKER_SUFFIX) + SCALE_SUFFIX
        tensor = checkpoint.tensors.get(scale)
        is_mxfp8 = tensor is not None and tensor.dtype == "U8"
        return ("MXFP8" if is_mxfp8 else "ComfyUI quantised"), markers[0]
    for name in sorted(names):
        dtype = checkpoint.tensors[name].dtype
        if name.endswith(("scaled_fp8", ".scale_weight")):
            return "FP8 with scales", name
        if dtype in _FLOAT8:
            scales = {name + "_scale", name.removesuffix(WEIGHT_SUFFIX) + ".scale_weight"}
            return ("FP8 with scales" if scales & names else "FP8"), name
        if name.endswith((".absmax", ".qweight", ".wscales")):
            return "4-bit", name
        if name.endswith(WEIGHT_SUFFIX) and dtype in ("I8", "U8", "F4"):
            return ("INT8" if dtype == "I8" else "4-bit"), name
    return None


def header_layers(value: str) -> dict[str, Any] | None:
    """The layers in a header's `_quantization_metadata`, or None if it has another form."""
    try:
        document = json.loads(value)
    except (ValueError, RecursionError):
        return None
    layers = document.get("layers") if isinstance(document, dict) else None
    if not isinstance(layers, dict) or document.get("format_version") != "1.0":
        return None
    return layers


def _format_of(layer: Any) -> str:
    kind = layer.get("format") if isinstance(layer, dict) else None
    return str(kind).upper() if kind else "ComfyUI quantised"
