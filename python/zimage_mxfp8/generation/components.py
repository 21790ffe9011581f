"""The parts that come from diffusers and transformers: loading, and what each is used for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline
from transformers import AutoModel, AutoTokenizer

from ..errors import CheckpointError, Error
from .folder import ModelFolder

MAX_TOKENS = 512  # of a prompt, with the marks around it; the default of diffusers' pipelines
# Of transformers: no network, and no code of the folder. Without the latter it asks the user.
_LOCAL = {"local_files_only": True, "trust_remote_code": False}


class TextEncoder:
    """Tokenizer and language model: from a prompt to caption features."""

    def __init__(self, folder: ModelFolder, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        with _loading(folder, "tokenizer") as path:
            tokenizer = AutoTokenizer.from_pretrained(path, **_LOCAL)
            if not tokenizer.chat_template:
                raise CheckpointError(f"{path} has no chat template; download the model again")
        with _loading(folder, "text_encoder") as path:
            model, found = AutoModel.from_pretrained(
                path, dtype=dtype, use_safetensors=True, output_loading_info=True, **_LOCAL
            )
            _check_complete(path, found)
        # Diffusers' own way of encoding, which needs nothing else of its pipeline.
        self._pipeline = ZImagePipeline(
            scheduler=None,
            vae=None,
            text_encoder=model.eval().to(device),
            tokenizer=tokenizer,
            transformer=None,
        )

    @torch.no_grad()
    def encode(self, prompt: str) -> torch.Tensor:
        """[tokens, features]; what goes beyond `MAX_TOKENS` is cut off."""
        (features,), _ = self._pipeline.encode_prompt(
            [prompt],
            device=self._device,
            do_classifier_free_guidance=False,
            max_sequence_length=MAX_TOKENS,
        )
        states: torch.Tensor = features
        return states


class VAE:
    """The autoencoder between latents and pictures."""

    def __init__(self, folder: ModelFolder, device: torch.device, dtype: torch.dtype) -> None:
        with _loading(folder, "vae") as path:
            model, found = AutoencoderKL.from_pretrained(
                path,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
            _check_complete(path, found)
        self.model = model.eval().to(device)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """[1, 16, H, W] -> [1, 3, 8 H, 8 W], -1 to 1."""
        config = self.model.config
        scaled = latents.to(self.model.dtype) / config.scaling_factor + config.shift_factor
        pixels: torch.Tensor = self.model.decode(scaled, return_dict=False)[0]
        return pixels


def load_scheduler(folder: ModelFolder) -> FlowMatchEulerDiscreteScheduler:
    """The sampler, with the shift that the folder gives it."""
    with _loading(folder, "scheduler") as path:
        return FlowMatchEulerDiscreteScheduler.from_pretrained(path, local_files_only=True)


@contextmanager
def _loading(folder: ModelFolder, part: str) -> Iterator[str]:
    """Turns whatever the libraries raise into a sentence that names the part."""
    path = folder.path / part
    try:
        yield str(path)
    except (Error, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the libraries have no exception of their own for bad files
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"{path} cannot be loaded: {lines[0].rstrip('.')}; download it again"
        ) from None


def _check_complete(path: str, found: dict[str, Any]) -> None:
    # Both libraries make up random numbers for what a file lacks, and only log it.
    lacking = sorted(map(str, found["missing_keys"]))
    if lacking:
        raise CheckpointError(
            f'the weights in {path} lack tensor "{lacking[0]}" ({len(lacking)} in all); download '
            "the model again"
        )
