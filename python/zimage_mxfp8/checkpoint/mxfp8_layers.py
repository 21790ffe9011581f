"""The MXFP8 layers of a checkpoint from any program, and errors in their storage.

Everything that ComfyUI reads is accepted: markers or header metadata or both, scales as U8 or
F8_E8M0, with or without `orig_shape`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from ..layout import padded_shape, scale_shape
from ..text import plural
from . import quantization as markers
from .quantization import Description
from .scopes import Scope
from .source import Checkpoint, SourceTensor

AGAIN = "convert the original again"


@dataclass(frozen=True)
class Breach:
    """A broken rule of the file contract.

    Attributes:
        tensor: the tensor or header key it is about.
        problem: the breach, as a clause about the tensor.
        remedy: how to repair it, in the imperative.
    """

    tensor: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f'"{self.tensor}" {self.problem}; {self.remedy}'


@dataclass(frozen=True)
class MXFP8Layer:
    """A quantised linear layer of a file.

    Attributes:
        name: name of the layer, with prefix.
        weight: codes, F8_E4M3 [roundup(N, 32), roundup(K, 32)].
        scale: E8M0 bytes in the 128x4 blocked layout.
        shape: [N, K] before padding.
        full_precision: whether its input must not be quantised, on any device.
    """

    name: str
    weight: SourceTensor
    scale: SourceTensor
    shape: tuple[int, int]
    full_precision: bool = False


@dataclass(frozen=True)
class MXFP8Layers:
    """Results of `find_layers`.

    Attributes:
        layers: the layers that can be read, by name.
        breaches: broken rules of the others.
        notes: details that ComfyUI reads and other programs may miss.
    """

    layers: list[MXFP8Layer]
    breaches: list[Breach]
    notes: list[str]


def find_layers(checkpoint: Checkpoint, scope: Scope) -> MXFP8Layers:
    """Return the MXFP8 layers of a model; reads the markers, not the weights.

    Raises:
        CheckpointError: a file cannot be read.
    """
    return _Finder(checkpoint, scope).find()


class _Finder:
    def __init__(self, checkpoint: Checkpoint, scope: Scope) -> None:
        self._checkpoint = checkpoint
        self._scope = scope
        self._breaches: list[Breach] = []
        self._remarks: Counter[str] = Counter()

    def find(self) -> MXFP8Layers:
        descriptions = markers.read_descriptions(self._checkpoint, self._scope)
        if descriptions.header_problem:
            self._breach(markers.HEADER_KEY, descriptions.header_problem)
        described = dict(descriptions.layers)
        for name, tensor in self._checkpoint.tensors.items():
            if name not in self._scope:
                continue
            if name.endswith(markers.SCALE_SUFFIX):
                described.setdefault(
                    name.removesuffix(markers.SCALE_SUFFIX), Description(None, None)
                )
            if tensor.dtype.startswith("F8_") and name.endswith(markers.WEIGHT_SUFFIX):
                layer = name.removesuffix(markers.WEIGHT_SUFFIX)
                described.setdefault(layer, Description(None, None))
        expected = self._expected_shapes(described)
        layers = []
        for name in sorted(described):
            count = len(self._breaches)
            found = self._layer(name, described[name], expected)
            if found is not None and len(self._breaches) == count:
                layers.append(found)
        return MXFP8Layers(layers, self._breaches, self._notes(described))

    def _breach(self, tensor: str, problem: str, remedy: str = AGAIN) -> None:
        self._breaches.append(Breach(tensor, problem, remedy))

    def _expected_shapes(self, described: dict[str, Description]) -> dict[str, tuple[int, ...]]:
        """Return the shapes before padding of a Z-Image's tensors, by name with prefix."""
        table = self._scope.table
        if not self._scope.zimage:
            return {}
        shapes, padded = {}, set()
        for inner, name in self._scope.inner_names(self._checkpoint.tensors).items():
            shapes[inner] = self._checkpoint.tensors[name].shape
            layer = name.removesuffix(markers.WEIGHT_SUFFIX)
            if layer != name and layer in described:
                if stated := _stated_shape(described[layer].believed):
                    shapes[inner] = stated
                else:
                    padded.add(inner)
        if len(shapes.get(table.anchor, ())) != 2:
            return {}
        expected = table.expected_shapes(shapes, padded)
        return {self._scope.prefix + inner: shape for inner, shape in expected.items()}

    def _layer(
        self, name: str, description: Description, expected: dict[str, tuple[int, ...]]
    ) -> MXFP8Layer | None:
        weight = self._checkpoint.tensors.get(name + markers.WEIGHT_SUFFIX)
        scale = self._checkpoint.tensors.get(name + markers.SCALE_SUFFIX)
        if weight is None:
            self._breach(
                name + markers.WEIGHT_SUFFIX,
                "is missing, though the file describes it as quantised",
            )
            return None
        if scale is None:
            self._breach(name + markers.SCALE_SUFFIX, "is missing")
        if not self._is_described(name, description) or scale is None:
            return None
        if weight.dtype != "F8_E4M3" or len(weight.shape) != 2:
            self._breach(
                weight.name, f"is {weight.dtype} {list(weight.shape)}, not a F8_E4M3 matrix"
            )
            return None
        shape = self._shape(weight, description, expected.get(weight.name))
        if shape is None:
            return None
        if scale.dtype not in markers.SCALE_DTYPES:
            self._breach(scale.name, f"is {scale.dtype}, not U8 or F8_E8M0")
        elif scale.shape != scale_shape(shape):
            self._breach(
                scale.name,
                f"is {list(scale.shape)}, but the blocked scales are {list(scale_shape(shape))}",
            )
        full = bool((description.believed or {}).get(markers.FULL_PRECISION_KEY))
        return MXFP8Layer(name, weight, scale, shape, full)

    def _is_described(self, name: str, description: Description) -> bool:
        marker, header = description.marker, description.header
        tensor = name + markers.MARKER_SUFFIX
        if description.unreadable:
            self._breach(tensor, description.unreadable)
            return False
        believed = description.believed
        if believed is None:
            self._breach(
                tensor,
                "is missing, and the header does not describe the layer: ComfyUI would load the "
                "codes without scales and draw noise",
            )
            return False
        if believed.get("format") != markers.MXFP8_FORMAT:
            place = tensor if header is None else markers.HEADER_KEY
            layer = f' for layer "{name}"' if header is not None else ""
            self._breach(place, f'has the format "{believed.get("format")}"{layer}, not "mxfp8"')
            return False
        if marker is not None and header is not None:
            for key in ("format", markers.FULL_PRECISION_KEY):
                if marker.get(key) != header.get(key):
                    self._breach(
                        markers.HEADER_KEY,
                        f'disagrees about layer "{name}" with its comfy_quant tensor '
                        f"({key}), and ComfyUI believes the header",
                    )
                    return False
            if marker != header:
                self._remarks["differs between header and comfy_quant tensor"] += 1
        return True

    def _shape(
        self, weight: SourceTensor, description: Description, expected: tuple[int, ...] | None
    ) -> tuple[int, int] | None:
        """Return [N, K] before padding: as stated, or Z-Image's if it fits, or the codes' shape."""
        rows, columns = weight.shape
        stated = _stated_shape(description.believed)
        if stated is not None:
            if weight.shape != padded_shape(stated):
                self._breach(
                    weight.name,
                    f"is {[rows, columns]}, but {list(stated)} padded to 32 is "
                    f"{list(padded_shape(stated))}",
                )
                return None
            return stated
        self._remarks["no orig_shape"] += 1
        if padded_shape((rows, columns)) != weight.shape or 0 in weight.shape:
            self._breach(weight.name, f"is {[rows, columns]}, not padded to multiples of 32")
            return None
        if expected is not None and len(expected) == 2:
            n, k = expected
            if padded_shape((n, k)) == weight.shape:
                return n, k
        return rows, columns

    def _notes(self, described: dict[str, Description]) -> list[str]:
        notes = []
        found = list(described.values())
        unmarked = sum(d.marker is None and d.header is not None for d in found)
        unlisted = sum(d.header is None and d.marker is not None for d in found)
        if unmarked and not self._checkpoint.is_folder:
            notes.append(
                f"{plural(unmarked, 'layer')} described in the header only: ComfyUI reads that, "
                "and programs that look for comfy_quant tensors do not"
            )
        if unlisted and not self._scope.prefix:
            notes.append(
                f"{plural(unlisted, 'layer')} described by comfy_quant tensors only: ComfyUI reads "
                f"them, and programs that look for {markers.HEADER_KEY} in the header do not"
            )
        if count := self._remarks["no orig_shape"]:
            notes.append(
                f"{plural(count, 'layer')} without orig_shape: ComfyUI does not need it; here it "
                "follows from the codes and Z-Image's shapes"
            )
        if count := self._remarks["differs between header and comfy_quant tensor"]:
            notes.append(
                f"{plural(count, 'layer')} described differently by header and comfy_quant tensor, "
                "in keys that ComfyUI does not read"
            )
        scales = sum(
            tensor.dtype == "F8_E8M0"
            and name in self._scope
            and name.endswith(markers.SCALE_SUFFIX)
            for name, tensor in self._checkpoint.tensors.items()
        )
        if scales:
            notes.append(
                f"{plural(scales, 'scale tensor')} stored as F8_E8M0, as ComfyUI saves them: "
                "readers without that dtype need U8"
            )
        return notes


def _stated_shape(entry: dict[str, Any] | None) -> tuple[int, int] | None:
    """Return [N, K] as a marker states it, or None."""
    shape = (entry or {}).get("orig_shape")
    if (
        isinstance(shape, list)
        and len(shape) == 2
        and all(type(n) is int and 0 < n < 2**31 for n in shape)
    ):
        return shape[0], shape[1]
    return None
