"""The quantised layers of a checkpoint, in the format that it is quantised with."""

from __future__ import annotations

from . import kinds
from .identify import Identified
from .int8_storage import Int8Storage
from .kinds import Kind
from .mxfp8_storage import MXFP8Storage
from .quantized_layers import LayerReader, QuantizedLayers, Storage

_MXFP8 = MXFP8Storage()
_STORAGES: dict[Kind | None, Storage] = {kinds.MXFP8: _MXFP8, kinds.INT8_CONVROT: Int8Storage()}


def find_layers(found: Identified) -> QuantizedLayers:
    """Return the quantised layers of a model; reads the markers, not the weights.

    The layers of a file that mixes MXFP8 with other formats are held against the rules of MXFP8.

    Raises:
        CheckpointError: a file cannot be read.
    """
    storage = _STORAGES.get(found.format, _MXFP8)
    return LayerReader(found.checkpoint, found.scope, storage).read()
