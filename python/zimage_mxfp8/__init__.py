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
from .dequantization import dequantize_checkpoint
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
from .inspection import Inspection, inspect
from .pipeline import Progress
from .recipes import Recipe, load_recipe
from .validation import ValidationReport, validate

__all__ = [
    "CheckpointError",
    "ConversionReport",
    "Error",
    "ErrorStats",
    "Inspection",
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
    "ValidationReport",
    "__version__",
    "convert",
    "dequantize",
    "dequantize_checkpoint",
    "from_blocked",
    "inspect",
    "load_recipe",
    "plan_conversion",
    "quantize",
    "to_blocked",
    "validate",
]
