"""Z-Image in MXFP8: conversion of checkpoints, and the codec that it stands on.

import zimage_mxfp8 as zm

report = zm.convert("z_image_turbo_bf16.safetensors", "z_image_turbo-mxfp8.safetensors")
encoded = zm.quantize(matrix)  # NumPy or torch
"""

from ._core import __version__
from .codec import MXFP8Array, dequantize, from_blocked, quantize, to_blocked
from .conversion.convert import convert, plan_conversion
from .conversion.plan import Plan
from .conversion.report import ConversionReport, ErrorStats
from .errors import (
    CheckpointError,
    Error,
    InvalidArgumentError,
    NonFiniteError,
    OutputError,
    RecipeError,
    UnsupportedError,
    UsageError,
)
from .pipeline import Progress
from .recipes import Recipe, load_recipe

__all__ = [
    "CheckpointError",
    "ConversionReport",
    "Error",
    "ErrorStats",
    "InvalidArgumentError",
    "MXFP8Array",
    "NonFiniteError",
    "OutputError",
    "Plan",
    "Progress",
    "Recipe",
    "RecipeError",
    "UnsupportedError",
    "UsageError",
    "__version__",
    "convert",
    "dequantize",
    "from_blocked",
    "load_recipe",
    "plan_conversion",
    "quantize",
    "to_blocked",
]
