"""The entry points that other servers call when they start, with any model."""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version

_LOG = logging.getLogger(__name__)


def register_vllm_omni() -> None:
    """Register the pipeline with vLLM-Omni, if this version of it was tested."""
    if _is_tested("vllm-omni", "0.30"):
        from vllm_omni.diffusion.registry import register_diffusion_model

        register_diffusion_model(
            "ZImagePipeline",
            "zimage_mxfp8.plugins.vllm_omni",
            "ZImagePipeline",
            post_process_func_name="get_post_process_func",
        )


def register_sglang() -> None:
    """Register the pipeline with SGLang under a name of its own, if this version was tested."""
    if _is_tested("sglang", "0.5.23"):
        from sglang.multimodal_gen.registry import register_pipeline

        from .sglang import GeneratorPipeline

        register_pipeline(
            GeneratorPipeline,
            sampling_param_cls=GeneratorPipeline.sampling_params_cls,
            pipeline_config_cls=GeneratorPipeline.pipeline_config_cls,
        )


def _is_tested(package: str, series: str) -> bool:
    """Return whether a package's version is one of a series, and say so if it is not."""
    try:
        installed = version(package)
    except PackageNotFoundError:  # a build under another name
        installed = "an unknown version"
    if installed == series or installed.startswith(f"{series}."):
        return True
    _LOG.warning(
        "zimage-mxfp8 draws inside %s %s, and this is %s, which it leaves alone; "
        'run pip install "%s==%s.*" for the other',
        package,
        series,
        installed,
        package,
        series,
    )
    return False
