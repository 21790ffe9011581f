"""The formats that weights are encoded in: one module each, and a row in the table here."""

from __future__ import annotations

from typing import Final, Literal, get_args

from ...checkpoint.int8_storage import Int8Layer
from ...checkpoint.quantized_layers import QuantizedLayer
from .int8_convrot import Int8ConvRot
from .mxfp8 import MXFP8
from .weight_format import WeightFormat

FormatName = Literal["mxfp8", "int8-convrot"]
FORMAT_NAMES: tuple[FormatName, ...] = get_args(FormatName)

FORMATS: Final[dict[FormatName, WeightFormat]] = {
    "mxfp8": MXFP8(),
    "int8-convrot": Int8ConvRot(),
}


def format_of(layer: QuantizedLayer) -> WeightFormat:
    """Return the format of a layer in a file."""
    return Int8ConvRot(layer.group) if isinstance(layer, Int8Layer) else FORMATS["mxfp8"]
