"""Pipelines for vLLM-Omni 0.30, which imports this module when it serves a Z-Image model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from vllm_omni.diffusion.cancellation import check_request_cancellation
from vllm_omni.diffusion.data import DiffusionOutput, OmniDiffusionConfig
from vllm_omni.diffusion.models.interface import SupportsComponentDiscovery
from vllm_omni.diffusion.models.z_image import pipeline_z_image as own
from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch
from vllm_omni.errors import OmniClientError

from ..errors import UsageError
from .drawing import ClientError, draw, load_generator


class ZImagePipeline(own.ZImagePipeline):
    """Stands for vLLM-Omni's pipeline: makes it or, if a transformer is given, this package's.

    Args:
        od_config: vLLM-Omni's configuration.
        prefix: of vLLM-Omni's pipeline.
    """

    supports_request_cancellation = True  # vLLM-Omni asks the class first, then the object

    def __new__(cls, *, od_config: OmniDiffusionConfig, prefix: str = "") -> Any:
        """Return one of the two pipelines."""
        if _options(od_config):
            return GeneratorPipeline(od_config)
        return own.ZImagePipeline(od_config=od_config, prefix=prefix)


class GeneratorPipeline(nn.Module, SupportsComponentDiscovery):
    """Draws with a `ZImageGenerator`, which loads and places its parts itself.

    Args:
        od_config: with the model's folder, the dtype, and the transformer and other options of
            `load_generator` in `custom_pipeline_args`.

    Raises:
        UsageError: the configuration asks for something that only vLLM-Omni's pipeline has.
        CheckpointError, UnsupportedError, CudaError: see `load_generator`.
    """

    supports_request_batch = False
    supports_request_cancellation = True
    lora_is_fused = True  # vLLM-Omni then leaves the adapters of requests to the pipeline
    weights_sources = ()
    _dit_modules: ClassVar[list[str]] = []
    _encoder_modules: ClassVar[list[str]] = []
    _vae_modules: ClassVar[list[str]] = []

    def __init__(self, od_config: OmniDiffusionConfig) -> None:
        super().__init__()
        self.od_config = od_config
        if od_config.parallel_config.world_size > 1:
            raise UsageError("num_gpus", "must be 1: this pipeline draws on one GPU")
        if od_config.lora_path:
            raise UsageError("lora_path", "has no effect here", "name adapters in requests")
        dtype = str(od_config.dtype).removeprefix("torch.")
        self._generator = load_generator(od_config.model, dtype, _options(od_config))

    def load_weights(self, _weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Return the names of the weights that were loaded: none, the generator has its own."""
        return set()

    def forward(self, req: DiffusionRequestBatch) -> DiffusionOutput:
        """Draw a request.

        Args:
            req: a batch of one request.

        Returns:
            PIL images; or the error for the client, if a value of the request, its image or its
            adapter cannot be used.

        Raises:
            DiffusionRequestAbortedError: it was cancelled.
            GenerationError, CudaError, UnsupportedError: see `ZImageGenerator.generate`.
        """
        try:
            images = draw(self._generator, _values(req), check_request_cancellation)
        except ClientError as error:
            # Raised, it would lose its status on the way: some executors keep the sentence only.
            return DiffusionOutput.from_exception(OmniClientError(str(error)))
        return DiffusionOutput(output=list(images))


def get_post_process_func(od_config: OmniDiffusionConfig) -> Callable[..., Any]:
    """Return what turns a pipeline's output into PIL images."""
    if _options(od_config):
        return lambda images: images
    theirs: Callable[..., Any] = own.get_post_process_func(od_config)
    return theirs


def _options(od_config: OmniDiffusionConfig) -> Mapping[str, Any]:
    """Return the options for a generator; none without a transformer, and for other pipelines."""
    options = od_config.custom_pipeline_args or {}
    return options if "transformer" in options else {}


def _values(req: DiffusionRequestBatch) -> dict[str, Any]:
    """Return the arguments of `GenerationSettings` for a request."""
    (prompt,) = req.prompts
    fields: Mapping[str, Any] = {"prompt": prompt} if isinstance(prompt, str) else prompt
    images = fields.get("multi_modal_data") or {}
    asked = req.sampling_params
    lora = asked.lora_request
    return {
        "prompt": fields["prompt"],
        "negative_prompt": fields.get("negative_prompt") or None,
        "steps": 8 if asked.num_inference_steps is None else asked.num_inference_steps,
        # Of an image with size "auto" vLLM-Omni tells the size, which need not be whole tokens.
        "width": None if asked.width_not_provided else asked.width,
        "height": None if asked.height_not_provided else asked.height,
        "guidance": asked.guidance_scale if asked.guidance_scale_provided else 0.0,
        "seed": asked.seed,
        "batch": asked.num_outputs_per_prompt,
        "init_image": _one(images.get("image")),
        "mask_image": images.get("mask_image"),
        "strength": asked.strength,
        "loras": [] if lora is None else [(lora.lora_path, asked.lora_scale)],
    }


def _one(image: Any) -> Any:
    """Return the image of a request, which may be in a list."""
    if not isinstance(image, list):
        return image
    if len(image) != 1:
        raise ClientError(f"image must be one image, not {len(image)}")
    return image[0]
