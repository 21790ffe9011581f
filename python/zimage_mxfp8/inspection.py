"""What is in a checkpoint, summed up by groups of tensors."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .checkpoint import quantization as marks
from .checkpoint.mxfp8_layers import find_layers
from .checkpoint.source import open_checkpoint
from .checkpoint.zimage import group_of, is_diffusers_layout, is_zimage, model_prefix


@dataclass
class Group:
    """Tensors that are shown in one row.

    Attributes:
        name: the group.
        formats: how many tensors there are of each format ("MXFP8", "BF16", ...). An MXFP8 layer
            counts once, its scales and marker included.
        parameters: elements, without padding and without scales.
        nbytes: bytes in the file.
    """

    name: str
    formats: dict[str, int] = field(default_factory=dict)
    parameters: int = 0
    nbytes: int = 0


@dataclass(repr=False)
class Inspection:
    """What `inspect` found.

    Attributes:
        path: what was looked at.
        kind: model and layout that the tensor names show.
        quantization: format that the transformer is quantised with, or None.
        files: number of safetensors files.
        metadata: of the header, without the description of quantised layers.
        groups: sums by group, the largest first.
        breaches: what is wrong with its MXFP8 layers.
    """

    path: str
    kind: str
    quantization: str | None
    files: int
    metadata: dict[str, str]
    groups: list[Group]
    breaches: list[str]

    def __repr__(self) -> str:
        return f"Inspection({self.path!r}, {self.kind}, {self.parameters:,} parameters)"

    def __str__(self) -> str:
        from .printing.inspection import print_inspection
        from .printing.screen import as_text

        return as_text(lambda screen: print_inspection(self, screen))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(group.nbytes for group in self.groups)

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(group.parameters for group in self.groups)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return vars(self) | {
            "groups": [vars(group) for group in self.groups],
            "parameters": self.parameters,
            "nbytes": self.nbytes,
        }


def inspect(path: str | os.PathLike[str]) -> Inspection:
    """Sum up a safetensors file or a diffusers folder; reads no weights.

    Raises:
        CheckpointError: unreadable or malformed.
    """
    checkpoint = open_checkpoint(Path(path))
    layers, breaches = find_layers(checkpoint)
    weights = {layer.weight.name: layer for layer in layers}
    parts = {layer.scale.name for layer in layers}
    parts |= {layer.name + marks.MARKER_SUFFIX for layer in layers}
    prefix = model_prefix(checkpoint.tensors)
    groups: dict[str, Group] = {}
    for name, tensor in sorted(checkpoint.tensors.items()):
        title = group_of(name, prefix)
        group = groups.setdefault(title, Group(title))
        group.nbytes += tensor.nbytes
        if name in parts:
            continue
        form = "MXFP8" if name in weights else tensor.dtype
        group.formats[form] = group.formats.get(form, 0) + 1
        shape = weights[name].shape if name in weights else tensor.shape
        group.parameters += math.prod(shape)
    if is_zimage(checkpoint.tensors):
        kind = "Z-Image, all-in-one layout" if prefix else "Z-Image, ComfyUI layout"
    else:
        diffusers = is_diffusers_layout(checkpoint.tensors)
        kind = "Z-Image, diffusers layout" if diffusers else "not Z-Image"
    metadata = {k: v for k, v in checkpoint.metadata.items() if k != marks.HEADER_KEY}
    quantization = marks.quantized_format(checkpoint, prefix)
    is_mxfp8 = quantization is not None and "MXFP8" in quantization[0]
    return Inspection(
        str(path),
        kind,
        quantization[0] if quantization else None,
        len(checkpoint.files),
        metadata,
        sorted(groups.values(), key=lambda group: -group.nbytes),
        [str(breach) for breach in breaches] if is_mxfp8 else [],
    )
