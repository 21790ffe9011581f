"""Recognition of adapters (LoRA and similar) by their tensor names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from ..zimage.layers import ZIMAGE

# Matrices of low-rank and Kronecker adapters, of orthogonal ones, and their side tensors.
_MATRIX = re.compile(
    r"(?:^|[._])(?:lora_(?:A|B|down|up|mid|linear_layer|magnitude_vector|embedding_[AB])"
    r"|lora\.(?:down|up)|hada_[wt][12](?:_[ab])?|lokr_(?:w[12](?:_[ab])?|t2)|oft_(?:blocks|R)"
    r"|dora_scale)(?:\.|$)"
)
_DIFFERENCE = re.compile(r"\.diff(?:_b)?$")

_TYPES = (
    ("LoKr", re.compile(r"lokr_")),
    ("LoHa", re.compile(r"hada_")),
    ("OFT", re.compile(r"oft_")),
    ("DoRA", re.compile(r"dora_scale|lora_magnitude_vector|\.magnitude$|dora_layer")),
    ("LoRA", re.compile(r"lora")),
    ("full difference", _DIFFERENCE),
)
# What diffusers makes of "lora_unet__", whose factors are zero where VideoX-Fun's alpha was.
DIFFUSERS_OF_VIDEOX = "transformer.."
# Prefixes of the transformer's modules, in the order in which they are tried: those that diffusers
# makes of trainers' prefixes, trainers' prefixes with dots, and those with underscores for dots.
MODULE_PREFIXES = (
    "transformer.transformer.",
    DIFFUSERS_OF_VIDEOX,
    "transformer.lora_transformer_",
    "transformer.lycoris_",
    "base_model.model.transformer.",
    "base_model.model.",
    "transformer.diffusion_model.",
    "transformer.",
    "diffusion_model.",
    "lora_unet__",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
)
_PREFIXES = (*MODULE_PREFIXES, "lora_te")
# Without the number of a layer that is the first of a sequence: some trainers drop it.
_ZIMAGE_LAYERS = [
    name.removesuffix(".0")
    for layer in ZIMAGE.block
    if layer.is_matrix
    for name in (layer.name, *layer.diffusers)
]
_MODELS = (
    ("Flux", re.compile(r"double_blocks|single_blocks|single_transformer_blocks")),
    ("Qwen-Image", re.compile(r"transformer_blocks[._]\d+[._](?:img_m|txt_m)")),
    (
        "Stable Diffusion XL",
        re.compile(
            r"lora_te2_|(?:down|up|input|output|middle|mid)_blocks?[._].*former_blocks[._][1-9]"
        ),
    ),
    ("Stable Diffusion", re.compile(r"(?:down|up|input|output|middle|mid)_blocks?[._]")),
    ("Wan", re.compile(r"blocks[._]\d+[._](?:self_attn|cross_attn)[._]")),
    ("Z-Image", re.compile("|".join(name.replace(".", "[._]") for name in _ZIMAGE_LAYERS))),
)
_RANK_SUFFIXES = ("lora_A", "lora_down", "lora.down", "hada_w1_b", "lokr_w2_b")


def find_adapter_tensor(names: Iterable[str]) -> str | None:
    """Return the first name, in order, that only an adapter has."""
    return min((name for name in names if _MATRIX.search(name)), default=None)


def is_adapter(names: Collection[str]) -> bool:
    """Return whether a file consists of adapters: low-rank matrices, or differences of weights."""
    return find_adapter_tensor(names) is not None or (
        bool(names) and all(_DIFFERENCE.search(name) for name in names)
    )


def adapted_model(names: Collection[str]) -> str | None:
    """Return the model whose modules an adapter names; None if unknown."""
    return next((title for title, p in _MODELS if any(p.search(n) for n in names)), None)


def describe_adapter(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Describe an adapter file: type, rank, model, spelling of the names.

    For example: LoRA of rank 8 for Z-Image, names begin with "transformer.".
    """
    names = sorted(shapes)
    kind = next((title for title, p in _TYPES if any(p.search(n) for n in names)), "adapter")
    ranks = {
        min(shape)
        for name, shape in shapes.items()
        if len(shape) == 2 and any(suffix in name for suffix in _RANK_SUFFIXES)
    }
    rank = f" of rank {' to '.join(map(str, sorted({min(ranks), max(ranks)})))}" if ranks else ""
    model = adapted_model(names)
    prefix = next((p for n in names for p in _PREFIXES if n.startswith(p)), None)
    spelled = f'names begin with "{prefix}"' if prefix else f'such as "{names[0]}"'
    return f"{kind}{rank}{f' for {model}' if model else ''}, {spelled}"
