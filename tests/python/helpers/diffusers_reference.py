"""Diffusers' own Z-Image transformer with random weights, as the reference for ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import ZImageTransformer2DModel
from safetensors.torch import load_file

CAPTION = 96


def make_reference(dim: int = 256, layers: int = 2, refiners: int = 1, seed: int = 0):
    """A small model in float32, with weights that keep activations near 1."""
    model = ZImageTransformer2DModel(
        dim=dim,
        n_layers=layers,
        n_refiner_layers=refiners,
        n_heads=dim // 128,
        n_kv_heads=dim // 128,
        cap_feat_dim=CAPTION,
        axes_dims=[32, 48, 48],
        axes_lens=[1536, 512, 512],
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name or name == "cap_embedder.0.weight":
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.dim() == 2 and "pad_token" not in name:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
            else:
                parameter.copy_(0.3 * noise)
    return model


def to_diffusers_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A ComfyUI-layout state dict in diffusers' layout."""
    renamed = {}
    for name, tensor in tensors.items():
        if name.endswith("attention.qkv.weight"):
            for part, weight in zip("qkv", tensor.chunk(3), strict=True):
                renamed[name.replace("qkv", f"to_{part}")] = weight
            continue
        for old, new in (
            ("attention.out.", "attention.to_out.0."),
            ("attention.q_norm.", "attention.norm_q."),
            ("attention.k_norm.", "attention.norm_k."),
        ):
            name = name.replace(old, new)
        for old, new in (
            ("x_embedder.", "all_x_embedder.2-1."),
            ("final_layer.", "all_final_layer.2-1."),
        ):
            if name.startswith(old):
                name = new + name.removeprefix(old)
        renamed[name] = tensor
    return renamed


def load_reference(model: ZImageTransformer2DModel, file: Path) -> None:
    """Give the reference the weights of a plain ComfyUI-layout file."""
    tensors = {name: tensor.float() for name, tensor in load_file(file).items()}
    model.load_state_dict(to_diffusers_names(tensors), strict=True)


def quantize_inputs(
    model: ZImageTransformer2DModel,
    layers: set[str],
    encode: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Let a function round what goes into the linear layers of the given ComfyUI names."""
    for name, module in model.named_modules():
        ours = name.replace("to_out.0", "out")
        for part in ("to_q", "to_k", "to_v"):
            ours = ours.replace(f"attention.{part}", "attention.qkv")
        if ours in layers and "adaLN" not in ours:
            module.register_forward_pre_hook(lambda _, args: (encode(args[0]),))


def random_inputs(
    sizes: list[tuple[int, int]], captions: list[int], seed: int = 1
) -> tuple[list[torch.Tensor], torch.Tensor, list[torch.Tensor]]:
    """Latents of (height, width), times and captions of so many tokens."""
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randn(16, 1, *size, generator=generator) for size in sizes]
    features = [torch.randn(n, CAPTION, generator=generator) for n in captions]
    return images, torch.rand(len(sizes), generator=generator), features


def relative_error(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """The largest of the items' relative errors (Frobenius)."""
    return max(
        ((a.double().cpu() - b.double().cpu()).norm() / b.double().norm()).item()
        for a, b in zip(found, wanted, strict=True)
    )


def save_in_bfloat16(model: torch.nn.Module, folder: Path) -> Path:
    """Save a model of diffusers in BF16, and return its folder."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    model.save_pretrained(folder)  # type: ignore[operator]
    return folder
