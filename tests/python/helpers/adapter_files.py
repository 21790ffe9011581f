"""Adapters as trainers write them, with the dense change that each stands for, in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]
Deltas = dict[str, torch.Tensor]  # by diffusers' module name


@dataclass
class Written:
    """A file's tensors, its metadata, and what it means."""

    tensors: Tensors
    deltas: Deltas
    metadata: dict[str, str] = field(default_factory=dict)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return numbers that float16 and bfloat16 hold exactly."""
    generator = torch.Generator().manual_seed(seed + 31 * sum(shape))
    return (torch.randn(shape, generator=generator) * 0.05).to(torch.bfloat16).float()


def modules_of(model: torch.nn.Module, ending: str = "") -> dict[str, torch.nn.Linear]:
    """Return the linear layers of diffusers' model, by name."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and name.endswith(ending)
    }


def low_rank(
    shape: tuple[int, int], rank: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return A, B and B A in float64."""
    a, b = random(rank, shape[1], seed=seed), random(shape[0], rank, seed=seed + 1)
    return a, b, b.double() @ a.double()


def write_pairs(
    modules: dict[str, torch.nn.Linear],
    name: Callable[[str], str],
    down: str,
    up: str,
    alpha: float | None = None,
    rank: int = 4,
    rank_scaled: bool | None = None,
) -> Written:
    """Write A and B of each module, under `name(module) + down` and `+ up`.

    An alpha of 0 means the rank. With `rank_scaled` it is said in a tensor whether alpha is over
    the rank's root.
    """
    tensors, deltas = {}, {}
    if rank_scaled is not None:
        tensors["use_rslora_flag"] = torch.tensor(rank_scaled)
    for i, (module, layer) in enumerate(modules.items()):
        a, b, delta = low_rank(tuple(layer.weight.shape), rank, 2 * i)
        tensors[name(module) + down], tensors[name(module) + up] = a, b
        if alpha is not None:
            tensors[name(module) + ".alpha"] = torch.tensor(alpha)
            delta = delta * ((alpha or rank) / (rank**0.5 if rank_scaled else rank))
        deltas[module] = delta
    return Written(tensors, deltas)


def underscored(prefix: str) -> Callable[[str], str]:
    """Names as kohya-like trainers write them."""
    return lambda module: prefix + module.replace(".", "_")


def dotted(prefix: str) -> Callable[[str], str]:
    """Names with a prefix."""
    return lambda module: prefix + module


def native(module: str) -> str:
    """ComfyUI's name of one of diffusers' modules that both have."""
    for theirs, ours in (
        ("attention.to_out.0", "attention.out"),
        ("all_x_embedder.2-1", "x_embedder"),
        ("all_final_layer.2-1", "final_layer"),
    ):
        module = module.replace(theirs, ours)
    return module


def fused_qkv(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """Return q, k and v of each attention as one layer, under ComfyUI's name."""
    modules, fused = modules_of(model), {}
    for name in modules_of(model, "attention.to_q"):
        block = name.removesuffix("to_q")
        weight = torch.cat([modules[f"{block}to_{part}"].weight for part in "qkv"])
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight.data = weight.detach()
        fused[f"{block}qkv"] = layer
    return fused


def of_parts(written: Written) -> Written:
    """Say what changes of fused layers are for diffusers' layers."""
    deltas: Deltas = {}
    for module, delta in written.deltas.items():
        if module.endswith(".qkv"):
            block = module.removesuffix("qkv")
            parts = zip("qkv", delta.chunk(3), strict=True)
            deltas |= {f"{block}to_{part}": rows for part, rows in parts}
        else:
            deltas[module] = delta
    return Written(written.tensors, deltas, written.metadata)


def write_fused_qkv(
    model: torch.nn.Module, name: Callable[[str], str], down: str, up: str
) -> Written:
    """Write one pair per block for q, k and v together, and for ComfyUI's "out"."""
    modules = fused_qkv(model) | modules_of(model, "attention.to_out.0")
    return of_parts(write_pairs(modules, lambda module: name(native(module)), down, up))


def write_block_diagonal(
    modules: dict[str, torch.nn.Linear], name: Callable[[str], str], alpha: float, rank: int = 4
) -> Written:
    """Write q, k and v that were trained apart as one pair of three times their rank and alpha."""
    written = Written({}, {})
    for i, (module, layer) in enumerate(modules.items()):
        columns = layer.weight.shape[1]
        parts = [low_rank((columns, columns), rank, 6 * i + 2 * part) for part in range(3)]
        written.tensors |= {
            f"{name(module)}.lora_down.weight": torch.cat([a for a, _, _ in parts]),
            f"{name(module)}.lora_up.weight": torch.block_diag(*(b for _, b, _ in parts)),
            f"{name(module)}.alpha": torch.tensor(3 * alpha),
        }
        written.deltas[module] = torch.cat([delta for _, _, delta in parts]) * (alpha / rank)
    return written


def write_differences(modules: dict[str, torch.nn.Linear], name: Callable[[str], str]) -> Written:
    """Write whole matrices."""
    tensors, deltas = {}, {}
    for i, (module, layer) in enumerate(modules.items()):
        tensors[f"{name(module)}.diff"] = difference = random(*layer.weight.shape, seed=i)
        deltas[module] = difference.double()
    return Written(tensors, deltas)


def write_peft(model: torch.nn.Module, alpha: float, rslora: bool) -> Written:
    """Diffusers' own trainer: alpha in the header."""
    modules = modules_of(model, "attention.to_q") | modules_of(model, "to_out.0")
    written = write_pairs(modules, dotted("transformer."), ".lora_A.weight", ".lora_B.weight")
    settings = {
        "transformer.r": 4,
        "transformer.lora_alpha": alpha,
        "transformer.target_modules": ["to_q", "to_out.0"],
        "transformer.use_rslora": rslora,
        "transformer.alpha_pattern": {"layers.0.attention.to_q": 2 * alpha},
    }
    written.metadata = {"lora_adapter_metadata": json.dumps(settings)}
    for module, delta in written.deltas.items():
        own = 2 * alpha if module == "layers.0.attention.to_q" else alpha
        written.deltas[module] = delta * (own / (2 if rslora else 4))
    return written


def write_loha(modules: dict[str, torch.nn.Linear], prefix: str, rank: int, alpha: float):
    """LoHa with alpha over rank."""
    written = Written({}, {})
    for i, (module, layer) in enumerate(modules.items()):
        shape = tuple(layer.weight.shape)
        a1, b1, first = low_rank(shape, rank, 3 * i)
        a2, b2, second = low_rank(shape, rank, 3 * i + 1)
        stem = underscored(prefix)(module)
        names = ("hada_w1_b", "hada_w1_a", "hada_w2_b", "hada_w2_a")
        pairs = zip(names, (a1, b1, a2, b2), strict=True)
        written.tensors |= {f"{stem}.{name}": 8 * tensor for name, tensor in pairs}
        written.tensors[f"{stem}.alpha"] = torch.tensor(alpha)
        written.deltas[module] = 8**4 * first * second * (alpha / rank)
    return written


def write_lokr(
    modules: dict[str, torch.nn.Linear],
    name: Callable[[str], str],
    split: str,
    alpha: float,
    left_shape: tuple[int, int] = (4, 2),
):
    """LoKr with whole factors, or with the second or both split."""
    left_rows, left_columns = left_shape
    written = Written({}, {})
    for i, (module, layer) in enumerate(modules.items()):
        rows, columns = layer.weight.shape
        left = random(left_rows, left_columns, seed=5 * i)
        right_shape = rows // left_rows, columns // left_columns
        stem = name(module)
        scale = 1.0
        if split == "both":
            u, v = 8 * random(left_rows, 2, seed=i), 8 * random(2, left_columns, seed=i + 1)
            written.tensors |= {f"{stem}.lokr_w1_a": u, f"{stem}.lokr_w1_b": v}
            left = u @ v
        else:
            written.tensors[f"{stem}.lokr_w1"] = left
        if split == "none":
            right = random(*right_shape, seed=7 * i)
            written.tensors[f"{stem}.lokr_w2"] = right
        else:
            a, b, _ = low_rank(right_shape, 2, 7 * i)
            written.tensors |= {f"{stem}.lokr_w2_b": a, f"{stem}.lokr_w2_a": b}
            right, scale = b @ a, alpha / 2
        written.tensors[f"{stem}.alpha"] = torch.tensor(alpha)
        written.deltas[module] = torch.kron(left.double(), right.double()) * scale
    return written


def write_dora(
    model: torch.nn.Module,
    name: Callable[[str], str],
    spelling: str,
    column: bool = False,
    modules: dict[str, torch.nn.Linear] | None = None,
    **options: Any,
) -> Written:
    """DoRA: the change depends on the weight, m (W + dW) / |W + dW| - W."""
    if modules is None:
        modules = modules_of(model, "feed_forward.w2") | modules_of(model, "attention.to_k")
    written = write_pairs(modules, name, ".lora_A.weight", ".lora_B.weight", **options)
    for i, (module, layer) in enumerate(modules.items()):
        changed = layer.weight.double() + written.deltas[module]
        norms = changed.norm(dim=0 if column else 1, keepdim=True)
        factor = 1 + random(*norms.shape, seed=i).double()
        magnitude = (norms * factor).float()
        shaped = magnitude if spelling == ".dora_scale" else magnitude.flatten()
        written.tensors[name(module) + spelling] = shaped
        written.deltas[module] = changed * (magnitude.double() / norms) - layer.weight.double()
    return written
