"""INT8 layers with one scale per row as files store them, rotated (ConvRot) or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import quantization as markers
from .quantization import Description
from .quantized_layers import Findings, QuantizedLayer, Storage
from .source import SourceTensor

_GROUPS = (1, 4, 16, 64, 256, 1024)  # columns that are rotated together
_DEFAULT_GROUP = 256  # ComfyUI's, where a marker does not say
_AS_WRITTEN = "convert the original again with groups of 256"


@dataclass(frozen=True)
class Int8Layer(QuantizedLayer):
    """A layer in INT8.

    `weight` has codes, I8 [N, K], and `scale` one number per row, F32 [N, 1].

    Attributes:
        group: columns that were rotated together: a power of 4; 1 if the layer is not rotated.
    """

    group: int = 1


class Int8Storage(Storage):
    """How INT8 layers are stored, see `Storage`."""

    marker_format = markers.INT8_FORMAT
    weight_dtype = "I8"
    described_keys = (
        "format",
        markers.FULL_PRECISION_KEY,
        markers.ROTATED_KEY,
        markers.GROUP_KEY,
    )

    def layer(
        self,
        name: str,
        weight: SourceTensor,
        scale: SourceTensor,
        description: Description,
        expected: tuple[int, ...] | None,  # noqa: ARG002 - nothing is padded
        findings: Findings,
    ) -> Int8Layer | None:
        """Return a layer, or report why there is none."""
        if weight.dtype != self.weight_dtype or len(weight.shape) != 2:
            findings.breach(
                weight.name, f"is {weight.dtype} {list(weight.shape)}, not an I8 matrix"
            )
            return None
        rows, columns = weight.shape
        if 0 in weight.shape:
            findings.breach(weight.name, f"is {[rows, columns]}, which is empty")
            return None
        if (scale.dtype, scale.shape) != ("F32", (rows, 1)):
            findings.breach(
                scale.name,
                f"is {scale.dtype} {list(scale.shape)}, but one scale per row is F32 {[rows, 1]}",
            )
            return None
        group = _group(description.believed or {})
        why = ""
        if type(group) is not int or group not in _GROUPS:
            why = f"are no power of 4 up to {_GROUPS[-1]}"
        elif columns % group:
            why = f"do not divide {columns}"
        if why:
            findings.breach(
                weight.name, f"is rotated in groups of {group} columns, which {why}", _AS_WRITTEN
            )
            return None
        return Int8Layer(name, weight, scale, (rows, columns), description.full_precision, group)


def _group(marker: dict[str, Any]) -> Any:
    """Return what a marker says of the columns that are rotated together, which may be anything."""
    return marker.get(markers.GROUP_KEY, _DEFAULT_GROUP) if marker.get(markers.ROTATED_KEY) else 1
