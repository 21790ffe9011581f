"""The parts that come from diffusers and transformers: loading and use."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline
from transformers import AutoModel, AutoTokenizer

from ..errors import CheckpointError, Error
from ..system.devices import is_out_of_host_memory
from .folder import ModelFolder

MAX_TOKENS = 512  # of a prompt, with its special tokens; the default of diffusers' pipelines
# For transformers: no network, and no code of the folder. Without the latter it asks the user.
_LOCAL = {"local_files_only": True, "trust_remote_code": False}
# For both: mismatched tensors are then listed; otherwise loading stops without naming them.
_LISTED = {"output_loading_info": True, "ignore_mismatched_sizes": True}
# Tensors of a whole language model; the text encoder is its body.
_OF_LANGUAGE_MODELS = ("lm_head.", "rotary_emb.inv_freq")
_PROBE = "quick brown fox"
_PROBE_TOKENS = 16


class TextEncoder:
    """Tokenizer and language model, which turn a prompt into caption features."""

    def __init__(self, folder: ModelFolder, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        with _loading(folder, "tokenizer") as path:
            tokenizer = AutoTokenizer.from_pretrained(path, **_LOCAL)
            if not tokenizer.chat_template:
                raise CheckpointError(f"{path} has no chat template; download the model again")
            largest = _check_tokenizer(path, tokenizer)
        with _loading(folder, "text_encoder") as path:
            model, found = AutoModel.from_pretrained(
                path, dtype=dtype, use_safetensors=True, **_LISTED, **_LOCAL
            )
            _check_complete(path, found, _OF_LANGUAGE_MODELS)
            rows = len(model.get_input_embeddings().weight)
            if largest >= rows:
                raise CheckpointError(
                    f"{folder.path / 'tokenizer'} has tokens up to number {largest}, and {path} "
                    f"up to {rows - 1}: they belong to different models; download the model again"
                )
            # Diffusers' own encoding, which needs no other part of its pipeline.
            self._pipeline = ZImagePipeline(
                scheduler=None,
                vae=None,
                text_encoder=model.eval().to(device),
                tokenizer=tokenizer,
                transformer=None,
            )
            # Tokenizers store the length that they pad to, so one call at a time.
            self._lock = threading.Lock()
            self._encode(_PROBE, _PROBE_TOKENS)  # some settings fail only when they are used

    def encode(self, prompt: str) -> torch.Tensor:
        """Return caption features [tokens, features]; tokens beyond `MAX_TOKENS` are cut off."""
        return self._encode(prompt, MAX_TOKENS)

    @torch.no_grad()
    def _encode(self, prompt: str, limit: int) -> torch.Tensor:
        with self._lock:
            (features,), _ = self._pipeline.encode_prompt(
                [prompt],
                device=self._device,
                do_classifier_free_guidance=False,
                max_sequence_length=limit,
            )
        states: torch.Tensor = features
        return states


class VAE:
    """The autoencoder between latents and images."""

    def __init__(self, folder: ModelFolder, device: torch.device, dtype: torch.dtype) -> None:
        with _loading(folder, "vae") as path:
            model, found = AutoencoderKL.from_pretrained(
                path,
                torch_dtype=dtype,  # SGLang 0.5.23 pins diffusers 0.37, which lacks `dtype`
                local_files_only=True,
                use_safetensors=True,
                low_cpu_mem_usage=False,  # it stops at the first shape that does not fit
                **_LISTED,
            )
            _check_complete(path, found)
        self.model = model.eval().to(device)

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """[1, 3, 8 H, 8 W], -1 to 1 -> [1, 16, H, W], the most likely latents."""
        config = self.model.config
        encoded = self.model.encode(pixels.to(self.model.device, self.model.dtype))
        latents: torch.Tensor = encoded.latent_dist.mode() - config.shift_factor
        return latents * float(config.scaling_factor)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents [1, 16, H, W] to an image [1, 3, 8 H, 8 W], -1 to 1."""
        config = self.model.config
        scaled = latents.to(self.model.dtype) / config.scaling_factor + config.shift_factor
        pixels: torch.Tensor = self.model.decode(scaled, return_dict=False)[0]
        return pixels


def load_scheduler(folder: ModelFolder) -> FlowMatchEulerDiscreteScheduler:
    """Return the sampler, with the shift that the folder gives it."""
    with _loading(folder, "scheduler") as path:
        return FlowMatchEulerDiscreteScheduler.from_pretrained(path, local_files_only=True)


@contextmanager
def _loading(folder: ModelFolder, part: str) -> Iterator[str]:
    """Turn any error of the libraries into a sentence that names the part."""
    path = folder.path / part
    try:
        yield str(path)
    except (Error, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the libraries have no exception of their own for bad files
        if is_out_of_host_memory(error):  # no memory; the files are good
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = lines[0]
        if reason.endswith(":"):  # the reason itself is in the next one
            reason = " ".join(line.strip() for line in lines[:2])
        raise CheckpointError(
            f"{path} cannot be loaded: {reason.rstrip('.:')}; download it again"
        ) from None


def _check_tokenizer(path: str, tokenizer: Any) -> int:
    """Return the largest token number, of a tokenizer that lets a prompt through."""
    if not tokenizer(_PROBE, add_special_tokens=False).input_ids:
        raise CheckpointError(f"{path} has no tokens for letters; download the model again")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": _PROBE}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=True,
    )
    if _PROBE not in text:
        raise CheckpointError(
            f"the chat template of {path} leaves out the prompt; download the model again"
        )
    tokenizer(text, padding="max_length", max_length=MAX_TOKENS)  # fails without a padding token
    return int(max(tokenizer.get_vocab().values()))


def _check_complete(path: str, found: dict[str, Any], more: tuple[str, ...] = ()) -> None:
    """Check that weights and settings belong together; names with `more` in them may be extra."""
    # Both libraries fill tensors that a file lacks with random numbers, and only log it.
    lacking = sorted(map(str, found["missing_keys"]))
    if lacking:
        raise CheckpointError(
            f'the weights in {path} lack tensor "{lacking[0]}" ({len(lacking)} in all); download '
            "the model again"
        )
    unfit = sorted(found["mismatched_keys"])
    if unfit:
        name, has, needed = unfit[0]
        raise CheckpointError(
            f'tensor "{name}" in {path} has shape {_shape(has)} where its config.json needs '
            f"{_shape(needed)} ({len(unfit)} in all); download the model again"
        )
    left = sorted(
        name
        for name in map(str, found["unexpected_keys"])
        if not any(part in name for part in more)
    )
    if left:
        raise CheckpointError(
            f'the weights in {path} have tensor "{left[0]}" ({len(left)} in all), for which its '
            "config.json has no place; download the model again"
        )


def _shape(sizes: Sequence[int]) -> str:
    return f"[{', '.join(map(str, sizes))}]"
