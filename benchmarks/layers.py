"""The linear layers of Z-Image's blocks, by the ends of their names."""

from __future__ import annotations

from zimage_mxfp8.zimage.layers import ZIMAGE

LINEARS = tuple(layer.name for group in ZIMAGE.linears().values() for layer in group)
MODULATIONS = tuple(layer.name for layer in ZIMAGE.modulations())
