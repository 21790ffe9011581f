"""INT8 layers with one scale per row as files store them, rotated (ConvRot) or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import quantization as markers
from .quantization import Description
from .quantized_layers import Findings, QuantizedLayer, Storage
from .source import SourceTensor

MAX_GROUP = 1024  # columns that are rotated together
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
            findings.breach(weight.name, f"is {weight.dtype} {list(weight.shape)}, not a I8 matrix")
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
        if group is None or columns % group:
            why = f"do not divide {columns}" if group else f"are no power of 4 up to {MAX_GROUP}"
            stated = (description.believed or {}).get(markers.GROUP_KEY)
            findings.breach(
                weight.name, f"is rotated in groups of {stated} columns, which {why}", _AS_WRITTEN
            )
            return None
        return Int8Layer(name, weight, scale, (rows, columns), description.full_precision, group)


def _group(marker: dict[str, Any]) -> int | None:
    """Return the columns that a marker says are rotated together, or None if they cannot be."""
    if not marker.get(markers.ROTATED_KEY):
        return 1
    group = marker.get(markers.GROUP_KEY, _DEFAULT_GROUP)
    powers = [4**exponent for exponent in range(1, 6)]
    return group if type(group) is int and group in powers and group <= MAX_GROUP else None
