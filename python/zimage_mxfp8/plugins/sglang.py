"""A pipeline for SGLang 0.5.23, which has this module registered when it serves images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sglang.multimodal_gen.configs.pipeline_configs.zimage import ZImagePipelineConfig
from sglang.multimodal_gen.configs.sample.zimage import ZImageTurboSamplingParams
from sglang.multimodal_gen.runtime.pipelines_core.composed_pipeline_base import ComposedPipelineBase
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req
from sglang.multimodal_gen.runtime.pipelines_core.stages import PipelineStage
from sglang.multimodal_gen.runtime.server_args import ServerArgs

from ..errors import UsageError
from .drawing import ClientError, checked, draw, load_generator

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass
class SamplingParams(ZImageTurboSamplingParams):
    """The fields of a request, with this package's defaults and limits."""

    num_inference_steps: int = 8

    def _adjust(self, server_args: ServerArgs) -> None:
        """Complete the fields; an error here gets status 400, and a later one 500."""
        super()._adjust(server_args)
        try:
            checked(_values(self))
        except ClientError as error:
            raise ValueError(str(error)) from None


class GeneratorPipeline(ComposedPipelineBase):
    """Draws with a `ZImageGenerator`, which loads and places its parts itself."""

    pipeline_name = "ZImageMXFP8Pipeline"
    pipeline_config_cls = ZImagePipelineConfig
    sampling_params_cls = SamplingParams

    def load_modules(self, server_args: ServerArgs, _loaded_modules: Any = None) -> dict[str, Any]:
        """Return the generator.

        Args:
            server_args: with the transformer's file, if it is not the folder's own.

        Raises:
            UsageError: the arguments ask for something that this pipeline does not have.
            CheckpointError, UnsupportedError, CudaError: see `load_generator`.
        """
        if server_args.num_gpus > 1:
            raise UsageError("num_gpus", "must be 1: this pipeline draws on one GPU")
        precision = server_args.pipeline_config.dit_precision
        dtype = _DTYPES.get(precision, precision)
        options = {"transformer": server_args.transformer_weights_path}
        return {"generator": load_generator(self.model_path, dtype, options)}

    def create_pipeline_stages(self, _server_args: ServerArgs) -> None:
        """Add the one stage."""
        self.add_stage(GeneratorStage(self.get_module("generator")), "generator_stage")


class GeneratorStage(PipelineStage):
    """From a request to its images.

    Args:
        generator: draws them.
    """

    def __init__(self, generator: Any) -> None:
        super().__init__()
        self._generator = generator

    def forward(self, batch: Req, _server_args: ServerArgs) -> Req:
        """Draw a request; its output becomes images [batch, 3, height, width], 0 to 1.

        Raises:
            GenerationError, CudaError, UnsupportedError: see `ZImageGenerator.generate`.
        """
        images = draw(self._generator, _values(batch))
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
        batch.output = pixels.permute(0, 3, 1, 2).float() / 255
        return batch


def _values(asked: Any) -> dict[str, Any]:
    """Return the arguments of `GenerationSettings` for the fields of a request."""
    seed = asked.seed
    return {
        "prompt": asked.prompt,
        "negative_prompt": asked.negative_prompt or None,
        "steps": asked.num_inference_steps,
        "width": asked.width,
        "height": asked.height,
        "guidance": asked.guidance_scale,
        "seed": seed[0] if isinstance(seed, list) else seed,
        "batch": asked.num_outputs_per_prompt,
    }
