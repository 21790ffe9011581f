"""MXFP8 layers as files store them.

Everything that ComfyUI reads is accepted: scales as U8 or F8_E8M0, with or without `orig_shape`.
"""

from __future__ import annotations

from ..layout import padded_shape, scale_shape
from . import quantization as markers
from .quantization import Description
from .quantized_layers import Findings, QuantizedLayer, Storage, stated_shape
from .source import SourceTensor


class MXFP8Layer(QuantizedLayer):
    """A layer in MXFP8.

    `weight` has codes, F8_E4M3 [roundup(N, 32), roundup(K, 32)], and `scale` has E8M0 bytes in the
    128x4 blocked layout.
    """


class MXFP8Storage(Storage):
    """How MXFP8 layers are stored, see `Storage`."""

    marker_format = markers.MXFP8_FORMAT
    weight_dtype = "F8_E4M3"
    described_keys = ("format", markers.FULL_PRECISION_KEY)

    def layer(
        self,
        name: str,
        weight: SourceTensor,
        scale: SourceTensor,
        description: Description,
        expected: tuple[int, ...] | None,
        findings: Findings,
    ) -> MXFP8Layer | None:
        """Return a layer, or report why there is none."""
        if weight.dtype != self.weight_dtype or len(weight.shape) != 2:
            findings.breach(
                weight.name, f"is {weight.dtype} {list(weight.shape)}, not a F8_E4M3 matrix"
            )
            return None
        shape = _shape(weight, description, expected, findings)
        if shape is None:
            return None
        if scale.dtype not in markers.SCALE_DTYPES:
            findings.breach(scale.name, f"is {scale.dtype}, not U8 or F8_E8M0")
        elif scale.shape != scale_shape(shape):
            findings.breach(
                scale.name,
                f"is {list(scale.shape)}, but the blocked scales are {list(scale_shape(shape))}",
            )
        return MXFP8Layer(name, weight, scale, shape, description.full_precision)


def _shape(
    weight: SourceTensor,
    description: Description,
    expected: tuple[int, ...] | None,
    findings: Findings,
) -> tuple[int, int] | None:
    """Return [N, K] before padding: as stated, or Z-Image's if it fits, or the codes' shape."""
    rows, columns = weight.shape
    stated = stated_shape(description.believed)
    if stated is not None:
        if weight.shape != padded_shape(stated):
            findings.breach(
                weight.name,
                f"is {[rows, columns]}, but {list(stated)} padded to 32 is "
                f"{list(padded_shape(stated))}",
            )
            return None
        return stated
    findings.remarks["no orig_shape"] += 1
    if padded_shape((rows, columns)) != weight.shape or 0 in weight.shape:
        findings.breach(weight.name, f"is {[rows, columns]}, not padded to multiples of 32")
        return None
    if expected is not None and len(expected) == 2:
        n, k = expected
        if padded_shape((n, k)) == weight.shape:
            return n, k
    return rows, columns
