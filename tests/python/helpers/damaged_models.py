"""Transformers that a gate has to refuse, made from a diffusers folder."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import zimage_mxfp8 as zm
from helpers.checkpoints import change

SWAPPED = ("layers.0.attention.out", "layers.1.attention.out")
_QUANTIZED = re.compile(r"(?:layers|noise_refiner|context_refiner)\..*(?:attention\.to_|\.w\d\.)")
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def corrupt_scales(folder: Path, output: Path) -> Path:
    """The folder's transformer in MXFP8, with the scales of two layers swapped."""
    sound = output.with_name(f"sound-{output.name}")
    zm.convert(folder, sound)

    def swap(tensors: dict[str, torch.Tensor], _: object) -> None:
        a, b = (f"{name}.weight_scale" for name in SWAPPED)
        tensors[a], tensors[b] = tensors[b], tensors[a]

    change(sound, output, swap)
    sound.unlink()
    return output


def with_nvfp4_error(folder: Path, output: Path) -> Path:
    """The folder's transformer in its own dtype, attention and feed-forward rounded to NVFP4."""
    tensors = {}
    for file in sorted((folder / "transformer").glob("*.safetensors")):
        tensors |= load_file(file)
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and _QUANTIZED.match(name):
            tensors[name] = round_to_nvfp4(tensor.float()).to(tensor.dtype)
    save_file(tensors, output)
    return output


def round_to_nvfp4(weight: torch.Tensor) -> torch.Tensor:
    """Blocks of 16 E2M1 codes along K with E4M3 scales, under a float32 scale of the tensor."""
    rows, columns = weight.shape
    blocks = torch.nn.functional.pad(weight, (0, -columns % 16)).view(rows, -1, 16)
    whole = weight.abs().max() / (6 * 448)
    scales = (blocks.abs().amax(2, keepdim=True) / 6 / whole).to(torch.float8_e4m3fn).float()
    scales = scales.clamp(min=2**-9) * whole
    nearest = (blocks.abs()[..., None] / scales[..., None] - _E2M1).abs().argmin(-1)
    rounded = _E2M1[nearest] * blocks.sign() * scales
    return rounded.reshape(rows, -1)[:, :columns].contiguous()
