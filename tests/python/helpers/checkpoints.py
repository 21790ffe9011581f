"""Checkpoints for tests: tensors, names, files."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from zimage_mxfp8.zimage.layers import zimage_shapes

Tensors = dict[str, torch.Tensor]


def random_tensors(
    shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator) * (0.05 if len(shape) > 1 else 1)).to(dtype)
        for name, shape in shapes.items()
    }


def small_shapes(layers: int = 30) -> dict[str, tuple[int, ...]]:
    """Z-Image with ragged sizes: neither the widths nor the hidden size are multiples of 32."""
    return zimage_shapes(dim=40, layers=layers, caption_dim=50, hidden=75)


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


PREFIX = "model.diffusion_model."


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as opened:
        return opened.metadata() or {}


def to_diffusers(tensors: Tensors) -> Tensors:
    """The diffusers layout of a ComfyUI-layout model, spelled out here independently."""
    result = {}
    for name, tensor in tensors.items():
        if name.endswith("attention.qkv.weight"):
            base = name.removesuffix("qkv.weight")
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                result[f"{base}to_{part}.weight"] = piece.contiguous()
            continue
        name = name.replace("attention.out.", "attention.to_out.0.")
        name = re.sub(r"attention\.([qk])_norm", r"attention.norm_\1", name)
        name = re.sub(r"^x_embedder\.", "all_x_embedder.2-1.", name)
        name = re.sub(r"^final_layer\.", "all_final_layer.2-1.", name)
        result[name] = tensor
    return result


def write_shards(folder: Path, tensors: Tensors, shards: int = 3) -> None:
    folder.mkdir(parents=True)
    weight_map = {}
    for i in range(shards):
        file = f"diffusion_pytorch_model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def change(source: Path, target: Path, edit) -> Path:
    from safetensors import safe_open

    with safe_open(source, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata() or {})
    edit(tensors, metadata)
    save_file(tensors, target, metadata)
    return target
