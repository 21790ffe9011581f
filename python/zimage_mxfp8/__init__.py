"""Z-Image in MXFP8: conversion of checkpoints, the model that runs them, and MXFP8 matrices.

    import zimage_mxfp8 as zm

    report = zm.convert("z_image_turbo_bf16.safetensors", "z_image_turbo-mxfp8.safetensors")
    transformer = zm.ZImageTransformer.from_checkpoint("z_image_turbo-mxfp8.safetensors")
    encoded = zm.quantize(matrix)  # NumPy or torch

Names are imported when they are first used, so that the command line starts quickly. If that needs
a package that is not installed, `MissingExtraError` says what to install.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._core import __version__
    from .adapters.summary import AdapterSummary
    from .analysis.compare.report import CompareReport
    from .analysis.compare.run import CompareProgress, compare
    from .analysis.evaluate.report import EvaluationReport
    from .analysis.evaluate.run import evaluate
    from .analysis.probe.run import ProbeReport, probe
    from .analysis.probe.scoring import ProbeRules
    from .analysis.sensitivity.run import SensitivityReport, analyse_sensitivity
    from .checkpoint.inspection import Inspection, inspect
    from .conversion.convert import convert, plan_conversion, run_conversion
    from .conversion.dequantization import dequantize_checkpoint
    from .conversion.export import ExportReport, export
    from .conversion.merge_loras import MergeReport, merge_loras
    from .conversion.options import ConversionOptions
    from .conversion.plan import Plan
    from .conversion.recipes import Recipe, load_recipe
    from .conversion.report import ConversionReport
    from .conversion.validation.report import ValidationReport
    from .conversion.validation.run import validate
    from .errors import (
        CheckpointError,
        CudaError,
        DeviceWarning,
        Error,
        GenerationError,
        InvalidArgumentError,
        MissingAttributeError,
        MissingExtraError,
        MissingFeatureError,
        NonFiniteError,
        OutputError,
        PrecisionLossError,
        RankError,
        RecipeError,
        UnsupportedError,
        UsageError,
        WrongKindError,
    )
    from .generation.generator import Generation, GenerationProgress, ZImageGenerator
    from .generation.settings import GenerationSettings
    from .ops.codec import MXFP8Array, dequantize, from_blocked, quantize, to_blocked
    from .ops.gemm import (
        FoldStats,
        GemmCandidate,
        Int8Array,
        RowScaledArray,
        explain_gemm,
        fold,
        gemm,
        gemm_kernel,
        quantize_rows,
    )
    from .streaming.error_stats import ErrorStats
    from .streaming.jobs import Progress
    from .system.diagnosis import Diagnosis, diagnose
    from .transformer.control import Control, ZImageControlNet
    from .transformer.model import ZImageTransformer
    from .zimage.config import ZImageConfig

_HOME = {
    "__version__": "_core",
    "AdapterSummary": "adapters.summary",
    "EvaluationReport": "analysis.evaluate.report",
    "evaluate": "analysis.evaluate.run",
    "SensitivityReport": "analysis.sensitivity.run",
    "analyse_sensitivity": "analysis.sensitivity.run",
    "ProbeReport": "analysis.probe.run",
    "probe": "analysis.probe.run",
    "ProbeRules": "analysis.probe.scoring",
    "CompareProgress": "analysis.compare.run",
    "compare": "analysis.compare.run",
    "CompareReport": "analysis.compare.report",
    "MXFP8Array": "ops.codec",
    "dequantize": "ops.codec",
    "from_blocked": "ops.codec",
    "quantize": "ops.codec",
    "to_blocked": "ops.codec",
    "convert": "conversion.convert",
    "plan_conversion": "conversion.convert",
    "run_conversion": "conversion.convert",
    "ConversionOptions": "conversion.options",
    "Plan": "conversion.plan",
    "ConversionReport": "conversion.report",
    "ExportReport": "conversion.export",
    "export": "conversion.export",
    "MergeReport": "conversion.merge_loras",
    "merge_loras": "conversion.merge_loras",
    "dequantize_checkpoint": "conversion.dequantization",
    "Diagnosis": "system.diagnosis",
    "diagnose": "system.diagnosis",
    "ErrorStats": "streaming.error_stats",
    "CheckpointError": "errors",
    "CudaError": "errors",
    "DeviceWarning": "errors",
    "Error": "errors",
    "GenerationError": "errors",
    "InvalidArgumentError": "errors",
    "MissingAttributeError": "errors",
    "MissingExtraError": "errors",
    "MissingFeatureError": "errors",
    "NonFiniteError": "errors",
    "RankError": "errors",
    "OutputError": "errors",
    "PrecisionLossError": "errors",
    "RecipeError": "errors",
    "UnsupportedError": "errors",
    "UsageError": "errors",
    "WrongKindError": "errors",
    "Generation": "generation.generator",
    "GenerationProgress": "generation.generator",
    "ZImageGenerator": "generation.generator",
    "GenerationSettings": "generation.settings",
    "FoldStats": "ops.gemm",
    "Int8Array": "ops.gemm",
    "RowScaledArray": "ops.gemm",
    "fold": "ops.gemm",
    "gemm": "ops.gemm",
    "gemm_kernel": "ops.gemm",
    "GemmCandidate": "ops.gemm",
    "explain_gemm": "ops.gemm",
    "quantize_rows": "ops.gemm",
    "Inspection": "checkpoint.inspection",
    "inspect": "checkpoint.inspection",
    "Progress": "streaming.jobs",
    "Recipe": "conversion.recipes",
    "load_recipe": "conversion.recipes",
    "ZImageConfig": "zimage.config",
    "Control": "transformer.control",
    "ZImageControlNet": "transformer.control",
    "ZImageTransformer": "transformer.model",
    "ValidationReport": "conversion.validation.report",
    "validate": "conversion.validation.run",
}

__all__ = [
    "AdapterSummary",
    "CheckpointError",
    "CompareProgress",
    "CompareReport",
    "Control",
    "ConversionOptions",
    "ConversionReport",
    "CudaError",
    "DeviceWarning",
    "Diagnosis",
    "Error",
    "ErrorStats",
    "EvaluationReport",
    "ExportReport",
    "FoldStats",
    "GemmCandidate",
    "Generation",
    "GenerationError",
    "GenerationProgress",
    "GenerationSettings",
    "Inspection",
    "Int8Array",
    "InvalidArgumentError",
    "MXFP8Array",
    "MergeReport",
    "MissingAttributeError",
    "MissingExtraError",
    "MissingFeatureError",
    "NonFiniteError",
    "OutputError",
    "Plan",
    "PrecisionLossError",
    "ProbeReport",
    "ProbeRules",
    "Progress",
    "RankError",
    "Recipe",
    "RecipeError",
    "RowScaledArray",
    "SensitivityReport",
    "UnsupportedError",
    "UsageError",
    "ValidationReport",
    "WrongKindError",
    "ZImageConfig",
    "ZImageControlNet",
    "ZImageGenerator",
    "ZImageTransformer",
    "__version__",
    "analyse_sensitivity",
    "compare",
    "convert",
    "dequantize",
    "dequantize_checkpoint",
    "diagnose",
    "evaluate",
    "explain_gemm",
    "export",
    "fold",
    "from_blocked",
    "gemm",
    "gemm_kernel",
    "inspect",
    "load_recipe",
    "merge_loras",
    "plan_conversion",
    "probe",
    "quantize",
    "quantize_rows",
    "run_conversion",
    "to_blocked",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .system.optional_packages import import_part

    value = globals()[name] = getattr(import_part(_HOME[name], name), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
