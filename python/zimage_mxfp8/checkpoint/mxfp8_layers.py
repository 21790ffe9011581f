"""The MXFP8 layers of a checkpoint, and everything that is wrong with how they are stored."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ..codec import padded_shape, scale_shape
from . import quantization as marks
from .source import Checkpoint, SourceTensor, TensorReader
from .zimage import model_prefix

_MARKER_LIMIT = 4096  # bytes; a marker has about 100


@dataclass(frozen=True)
class Breach:
    """A broken rule of the file contract.

    Attributes:
        tensor: the tensor or header key it is about.
        problem: what is wrong.
        remedy: what to do about it.
    """

    tensor: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f'"{self.tensor}" {self.problem}; {self.remedy}'


@dataclass(frozen=True)
class MXFP8Layer:
    """A quantised linear layer of a file; `shape` is [N, K] before padding."""

    name: str
    weight: SourceTensor
    scale: SourceTensor
    shape: tuple[int, int]


AGAIN = "convert the original again"


def find_layers(checkpoint: Checkpoint) -> tuple[list[MXFP8Layer], list[Breach]]:
    """The layers that are stored as the contract says, by name, and the breaches of the others.

    In an all-in-one file only the transformer counts.

    Reads the markers, not the weights.

    Raises:
        CheckpointError: a file cannot be read.
    """
    prefix = model_prefix(checkpoint.tensors)
    tensors = {n: tensor for n, tensor in checkpoint.tensors.items() if n.startswith(prefix)}
    breaches: list[Breach] = []
    header = _header_layers(checkpoint, prefix, breaches)
    names = set(header)
    for name, tensor in tensors.items():
        for suffix in (marks.MARKER_SUFFIX, marks.SCALE_SUFFIX):
            if name.endswith(suffix):
                names.add(name.removesuffix(suffix))
        if tensor.dtype.startswith("F8_") and name.endswith(marks.WEIGHT_SUFFIX):
            names.add(name.removesuffix(marks.WEIGHT_SUFFIX))
    layers = []
    with TensorReader() as reader:
        for name in sorted(names):
            found = len(breaches)
            layer = _check_layer(checkpoint, name, header.get(name), reader, breaches)
            if layer is not None and len(breaches) == found:
                layers.append(layer)
    return layers, breaches


def _header_layers(checkpoint: Checkpoint, prefix: str, breaches: list[Breach]) -> dict[str, Any]:
    text = checkpoint.metadata.get(marks.HEADER_KEY)
    if text is None:
        if any(
            n.startswith(prefix) and n.endswith(marks.MARKER_SUFFIX) for n in checkpoint.tensors
        ):
            breaches.append(Breach(marks.HEADER_KEY, "is missing from the header", AGAIN))
        return {}
    layers = marks.header_layers(text)
    if layers is None:
        breaches.append(
            Breach(
                marks.HEADER_KEY, 'is not {"format_version": "1.0", "layers": {...}} in JSON', AGAIN
            )
        )
        return {}
    return {name: marker for name, marker in layers.items() if name.startswith(prefix)}


def _check_layer(
    checkpoint: Checkpoint,
    name: str,
    header_marker: Any,
    reader: TensorReader,
    breaches: list[Breach],
) -> MXFP8Layer | None:
    weight_name = name + marks.WEIGHT_SUFFIX
    weight = checkpoint.tensors.get(weight_name)
    scale = checkpoint.tensors.get(name + marks.SCALE_SUFFIX)
    marker = checkpoint.tensors.get(name + marks.MARKER_SUFFIX)

    def breach(tensor: str, problem: str, remedy: str = AGAIN) -> None:
        breaches.append(Breach(tensor, problem, remedy))

    if weight is None:
        breach(weight_name, "is missing, though the file describes it as quantised")
        return None
    if marker is None:
        breach(
            name + marks.MARKER_SUFFIX,
            "is missing: ComfyUI would load the codes without scales and draw noise",
        )
    if scale is None:
        breach(name + marks.SCALE_SUFFIX, "is missing")
    if marker is None or scale is None:
        return None
    shape = _marker_shape(marker, header_marker, name, reader, breaches)
    if shape is None:
        return None
    if weight.dtype != "F8_E4M3":
        breach(weight_name, f"is {weight.dtype}, not F8_E4M3")
    elif weight.shape != padded_shape(shape):
        breach(
            weight_name,
            f"is {list(weight.shape)}, but {list(shape)} padded to 32 is "
            f"{list(padded_shape(shape))}",
        )
    if scale.dtype == "F8_E8M0":
        breach(scale.name, "is F8_E8M0, which ComfyUI's loader does not know; it must be U8")
    elif scale.dtype != "U8":
        breach(scale.name, f"is {scale.dtype}, not U8")
    elif scale.shape != scale_shape(shape):
        breach(
            scale.name,
            f"is {list(scale.shape)}, but the blocked scales are {list(scale_shape(shape))}",
        )
    return MXFP8Layer(name, weight, scale, shape)


def _marker_shape(
    marker: SourceTensor,
    header_marker: Any,
    name: str,
    reader: TensorReader,
    breaches: list[Breach],
) -> tuple[int, int] | None:
    """[N, K] of a layer's marker, if the marker is an MXFP8 one."""

    def breach(tensor: str, problem: str) -> None:
        breaches.append(Breach(tensor, problem, AGAIN))

    if marker.dtype != "U8" or len(marker.shape) != 1 or marker.nbytes > _MARKER_LIMIT:
        breach(marker.name, f"is {marker.dtype} {list(marker.shape)}, not a short list of U8")
        return None
    text = reader.read(marker).tobytes()
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        breach(marker.name, "is not JSON")
        return None
    kind = found.get("format") if isinstance(found, dict) else None
    if kind != "mxfp8":
        breach(marker.name, f'has the format "{kind}", not "mxfp8"')
        return None
    shape = found.get("orig_shape")
    if not (
        isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)
    ):
        breach(marker.name, "has no orig_shape [N, K]")
        return None
    expected = marks.layer_marker((shape[0], shape[1]))
    if found != expected:
        differing = [key for key in {**expected, **found} if found.get(key) != expected.get(key)]
        breach(marker.name, f"differs from the contract in {', '.join(differing)}")
    elif text != marks.marker_bytes(expected):
        breach(marker.name, "spells its JSON differently from the contract")
    if header_marker != found:
        breach(
            marks.HEADER_KEY,
            f'says something else of layer "{name}" than its comfy_quant tensor, and ComfyUI '
            "believes the header",
        )
    return shape[0], shape[1]
