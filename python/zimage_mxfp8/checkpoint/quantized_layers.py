"""The quantised layers of a checkpoint from any program, and errors in their storage.

Everything that ComfyUI reads is accepted: markers or header metadata or both. How a format stores a
layer is in `mxfp8_storage.py` and `int8_storage.py`.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..errors import CheckpointError
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
class QuantizedLayer:
    """A quantised linear layer of a file.

    Attributes:
        name: name of the layer, with prefix.
        weight: its codes.
        scale: its scales.
        shape: [N, K] before padding.
        full_precision: whether its input must not be quantised, on any device.
    """

    name: str
    weight: SourceTensor
    scale: SourceTensor
    shape: tuple[int, int]
    full_precision: bool = False


@dataclass(frozen=True)
class QuantizedLayers:
    """The quantised layers of a model.

    Attributes:
        layers: the layers that can be read, by name.
        breaches: broken rules of the others.
        notes: details that ComfyUI reads and other programs may miss.
        broken: names of the others, whose tensors a breach explains.
    """

    layers: list[QuantizedLayer]
    breaches: list[Breach]
    notes: list[str]
    broken: frozenset[str]

    def require_sound(self, path: str | os.PathLike[str]) -> None:
        """Raise CheckpointError, with the first breach, if there are any."""
        if self.breaches:
            count = plural(len(self.breaches), "breach", "breaches")
            raise CheckpointError(
                f"{path} breaks the contract: {self.breaches[0]} ({count} in all)"
            )


def damaged(
    path: str | os.PathLike[str], layers: Sequence[str], problem: object
) -> CheckpointError:
    """Return the error for layers whose data cannot be decoded."""
    return CheckpointError(
        f'{path}: layer "{" and ".join(layers)}" is damaged: {problem}; '
        "zimage-mxfp8 validate says more"
    )


@dataclass
class Findings:
    """What is found while layers are read.

    Attributes:
        breaches: broken rules.
        remarks: how many layers have a property that is worth a note.
    """

    breaches: list[Breach] = field(default_factory=list)
    remarks: Counter[str] = field(default_factory=Counter)

    def breach(self, tensor: str, problem: str, remedy: str = AGAIN) -> None:
        """Add a broken rule."""
        self.breaches.append(Breach(tensor, problem, remedy))


class Storage(ABC):
    """How files store the layers of a format.

    Attributes:
        marker_format: the `format` in its markers.
        weight_dtype: the dtype of codes.
        described_keys: keys of a description that change what a layer computes.
    """

    marker_format: ClassVar[str]
    weight_dtype: ClassVar[str]
    described_keys: ClassVar[tuple[str, ...]]

    @abstractmethod
    def layer(
        self,
        name: str,
        weight: SourceTensor,
        scale: SourceTensor,
        description: Description,
        expected: tuple[int, ...] | None,
        findings: Findings,
    ) -> QuantizedLayer | None:
        """Return a layer, or report why there is none.

        Args:
            name: name of the layer, with prefix.
            weight: its codes.
            scale: its scales.
            description: its description, in this format.
            expected: the shape that Z-Image's table gives it.
            findings: takes breaches and remarks.
        """


class LayerReader:
    """A reader of a model's layers in one format.

    Args:
        checkpoint: the file.
        scope: the model's tensors.
        storage: how the format stores layers.
    """

    def __init__(self, checkpoint: Checkpoint, scope: Scope, storage: Storage) -> None:
        self._checkpoint = checkpoint
        self._scope = scope
        self._storage = storage
        self._findings = Findings()

    def read(self) -> QuantizedLayers:
        """Return the layers; reads the markers, not the weights.

        Raises:
            CheckpointError: a file cannot be read.
        """
        breaches = self._findings.breaches
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
            if self._is_encoded(tensor) and name.endswith(markers.WEIGHT_SUFFIX):
                layer = name.removesuffix(markers.WEIGHT_SUFFIX)
                described.setdefault(layer, Description(None, None))
        expected = self._expected_shapes(described)
        layers = {}
        for name in sorted(described):
            count = len(breaches)
            found = self._layer(name, described[name], expected)
            if found is not None and len(breaches) == count:
                layers[name] = found
        broken = frozenset(described.keys() - layers.keys())
        return QuantizedLayers(list(layers.values()), breaches, self._notes(described), broken)

    def _breach(self, tensor: str, problem: str, remedy: str = AGAIN) -> None:
        self._findings.breach(tensor, problem, remedy)

    def _is_encoded(self, tensor: SourceTensor) -> bool:
        return tensor.dtype.startswith("F8_") or tensor.dtype == self._storage.weight_dtype

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
                if stated := stated_shape(described[layer].believed):
                    shapes[inner] = stated
                else:
                    padded.add(inner)
        if len(shapes.get(table.anchor, ())) != 2:
            return {}
        expected = table.expected_shapes(shapes, padded)
        return {self._scope.prefix + inner: shape for inner, shape in expected.items()}

    def _layer(
        self, name: str, description: Description, expected: dict[str, tuple[int, ...]]
    ) -> QuantizedLayer | None:
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
            return None
        if not self._is_described(name, description):
            return None
        return self._storage.layer(
            name, weight, scale, description, expected.get(weight.name), self._findings
        )

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
        wanted = self._storage.marker_format
        if believed.get("format") != wanted:
            place = tensor if header is None else markers.HEADER_KEY
            layer = f' for layer "{name}"' if header is not None else ""
            self._breach(place, f'has the format "{believed.get("format")}"{layer}, not "{wanted}"')
            return False
        if marker is not None and header is not None:
            for key in self._storage.described_keys:
                if marker.get(key) != header.get(key):
                    self._breach(
                        markers.HEADER_KEY,
                        f'disagrees about layer "{name}" with its comfy_quant tensor '
                        f"({key}), and ComfyUI believes the header",
                    )
                    return False
            if markers.header_entry(marker) != markers.header_entry(header):
                self._findings.remarks["differs between header and comfy_quant tensor"] += 1
        return True

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
        if count := self._findings.remarks["no orig_shape"]:
            notes.append(
                f"{plural(count, 'layer')} without orig_shape: ComfyUI does not need it; here it "
                "follows from the codes and Z-Image's shapes"
            )
        if count := self._findings.remarks["differs between header and comfy_quant tensor"]:
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


def stated_shape(entry: dict[str, Any] | None) -> tuple[int, int] | None:
    """Return [N, K] as a marker states it, or None."""
    shape = (entry or {}).get("orig_shape")
    if (
        isinstance(shape, list)
        and len(shape) == 2
        and all(type(n) is int and 0 < n < 2**31 for n in shape)
    ):
        return shape[0], shape[1]
    return None
