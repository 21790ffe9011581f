"""What the tensors of Z-Image are called: recognition, layouts and groups.

Names are those of the ComfyUI single file, which the original repository shares. An all-in-one
file holds them under `model.diffusion_model.`, beside a text encoder and a VAE. Diffusers splits
`attention.qkv` and renames a few others; `to_comfyui_layout` undoes that.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace

from ..errors import CheckpointError
from .source import Checkpoint, SourceTensor

SINGLE_FILE_PREFIX = "model.diffusion_model."
_ESSENTIALS = ("cap_embedder.1.weight", "cap_pad_token")  # of a transformer with any blocks
_SIGNATURE = (*_ESSENTIALS, "noise_refiner.0.attention.k_norm.weight")  # that ComfyUI looks for

_DIFFUSERS_NAMES = (
    (re.compile(r"\.attention\.to_out\.0\."), ".attention.out."),
    (re.compile(r"\.attention\.norm_([qk])\."), r".attention.\1_norm."),
    (re.compile(r"^all_x_embedder\.2-1\."), "x_embedder."),
    (re.compile(r"^all_final_layer\.2-1\."), "final_layer."),
)
_DIFFUSERS_QKV = re.compile(r"^(?P<block>.+)\.attention\.to_(?P<part>[qkv])\.(?P<kind>.+)$")

_HEAD_DIM = 128
_PATCH_FEATURES = 64  # 2 x 2 patches of 16 latent channels

# Numbers as Z-Image writes them: 07 or digits of other scripts would be taken for another block.
BLOCK_TENSOR = re.compile(
    r"^(?P<stack>layers|noise_refiner|context_refiner)\.(?P<block>0|[1-9][0-9]{0,8})\.(?P<part>.+)$"
)
_STACKS = ("layers", "noise_refiner", "context_refiner")
_EMBEDDERS = ("x_embedder.", "cap_embedder.", "t_embedder.", "x_pad_token", "cap_pad_token")


def zimage_shapes(
    dim: int = 3840,
    layers: int = 30,
    refiner_layers: int = 2,
    caption_dim: int = 2560,
    hidden: int | None = None,
) -> dict[str, tuple[int, ...]]:
    """Name -> shape of Z-Image's tensors in the ComfyUI layout; the defaults are the real model's.

    Args:
        dim: width of the model, a multiple of 128.
        layers: number of main blocks.
        refiner_layers: number of blocks in each of the two refiners.
        caption_dim: features of the text encoder.
        hidden: width of the feed-forward layers, by default int(dim / 3 * 8).
    """
    hidden = int(dim / 3 * 8) if hidden is None else hidden
    modulation = min(dim, 256)
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.weight": (dim, _PATCH_FEATURES),
        "x_embedder.bias": (dim,),
        "cap_embedder.0.weight": (caption_dim,),
        "cap_embedder.1.weight": (dim, caption_dim),
        "cap_embedder.1.bias": (dim,),
        "t_embedder.mlp.0.weight": (1024, 256),
        "t_embedder.mlp.0.bias": (1024,),
        "t_embedder.mlp.2.weight": (modulation, 1024),
        "t_embedder.mlp.2.bias": (modulation,),
        "x_pad_token": (1, dim),
        "cap_pad_token": (1, dim),
        "final_layer.linear.weight": (_PATCH_FEATURES, dim),
        "final_layer.linear.bias": (_PATCH_FEATURES,),
        "final_layer.adaLN_modulation.1.weight": (dim, modulation),
        "final_layer.adaLN_modulation.1.bias": (dim,),
    }
    stacks = {"layers": layers, "noise_refiner": refiner_layers, "context_refiner": refiner_layers}
    for stack, count in stacks.items():
        for i in range(count):
            block = f"{stack}.{i}."
            shapes[block + "attention.qkv.weight"] = (3 * dim, dim)
            shapes[block + "attention.out.weight"] = (dim, dim)
            shapes[block + "attention.q_norm.weight"] = (_HEAD_DIM,)
            shapes[block + "attention.k_norm.weight"] = (_HEAD_DIM,)
            shapes[block + "feed_forward.w1.weight"] = (hidden, dim)
            shapes[block + "feed_forward.w2.weight"] = (dim, hidden)
            shapes[block + "feed_forward.w3.weight"] = (hidden, dim)
            for norm in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
                shapes[f"{block}{norm}.weight"] = (dim,)
            if stack != "context_refiner":
                shapes[block + "adaLN_modulation.0.weight"] = (4 * dim, modulation)
                shapes[block + "adaLN_modulation.0.bias"] = (4 * dim,)
    return shapes


def is_zimage(names: Collection[str]) -> bool:
    """Whether these tensor names are those of a Z-Image transformer in the ComfyUI layout."""
    prefix = model_prefix(names)
    return all(prefix + name in names for name in _SIGNATURE)


def missing_signature(names: Collection[str]) -> list[str]:
    """What keeps a checkpoint from being recognised as Z-Image, if it looks like one otherwise."""
    prefix = model_prefix(names)
    if not any(name.startswith(f"{prefix}noise_refiner.") for name in names):
        return []
    return [prefix + name for name in _SIGNATURE if prefix + name not in names]


def missing_essentials(names: Collection[str]) -> list[str]:
    """What a Z-Image transformer lacks of the tensors that it has however many blocks there are."""
    prefix = model_prefix(names)
    return [prefix + name for name in _ESSENTIALS if prefix + name not in names]


def model_prefix(names: Collection[str]) -> str:
    """What stands before the transformer's tensor names: `SINGLE_FILE_PREFIX` or nothing."""
    return SINGLE_FILE_PREFIX if any(n.startswith(SINGLE_FILE_PREFIX) for n in names) else ""


def is_diffusers_layout(names: Collection[str]) -> bool:
    """Whether these are the names of a diffusers `ZImageTransformer2DModel`."""
    return any(name.startswith("all_x_embedder.") for name in names)


def to_comfyui_layout(checkpoint: Checkpoint) -> Checkpoint:
    """Rename a diffusers checkpoint's tensors and stack q, k and v; others pass unchanged.

    Nothing is read: the stacked tensor is the three tensors' bytes in a row.

    Raises:
        CheckpointError: q, k and v are incomplete or do not fit together, or two tensors get the
            same name.
    """
    if not is_diffusers_layout(checkpoint.tensors):
        return checkpoint
    renamed: list[SourceTensor] = []
    parts: dict[tuple[str, str], dict[str, SourceTensor]] = {}
    for name, tensor in checkpoint.tensors.items():
        if match := _DIFFUSERS_QKV.match(name):
            parts.setdefault((match["block"], match["kind"]), {})[match["part"]] = tensor
            continue
        for pattern, replacement in _DIFFUSERS_NAMES:
            name = pattern.sub(replacement, name)
        renamed.append(SourceTensor(name, tensor.dtype, tensor.shape, tensor.segments))
    for (block, kind), found in parts.items():
        renamed.append(_stack_qkv(checkpoint, f"{block}.attention", kind, found))
    tensors = {tensor.name: tensor for tensor in renamed}
    if len(tensors) < len(renamed):
        seen = Counter(tensor.name for tensor in renamed)
        twice = next(name for name, count in seen.items() if count > 1)
        raise CheckpointError(
            f'{checkpoint.path} has "{twice}" both under its own and under its diffusers name'
        )
    return replace(checkpoint, tensors=tensors)


def _stack_qkv(
    checkpoint: Checkpoint, attention: str, kind: str, found: dict[str, SourceTensor]
) -> SourceTensor:
    names = {part: f"{attention}.to_{part}.{kind}" for part in "qkv"}
    for part in "qkv":
        if part not in found:
            raise CheckpointError(
                f'{checkpoint.path} lacks tensor "{names[part]}", which belongs to '
                f'"{next(iter(found.values())).name}"; download it again'
            )
    q, k, v = (found[part] for part in "qkv")
    for other in (k, v):
        if (other.dtype, len(other.shape), other.shape[1:]) != (q.dtype, len(q.shape), q.shape[1:]):
            raise CheckpointError(
                f"{checkpoint.path} has tensors that cannot be stacked: "
                f'"{q.name}" is {q.dtype} {list(q.shape)}, '
                f'"{other.name}" is {other.dtype} {list(other.shape)}'
            )
    if not q.shape:
        raise CheckpointError(f'{checkpoint.path} has the scalar "{q.name}", which is no weight')
    return SourceTensor(
        f"{attention}.qkv.{kind}",
        q.dtype,
        (q.shape[0] + k.shape[0] + v.shape[0], *q.shape[1:]),
        q.segments + k.segments + v.segments,
    )


def group_of(name: str, prefix: str) -> str:
    """The group that a tensor is shown under in tables; `prefix` as from `model_prefix`."""
    if not name.startswith(prefix):
        return name.split(".", 1)[0] + " (not the transformer)"
    inner = name[len(prefix) :]
    if match := BLOCK_TENSOR.match(inner):
        part = match["part"]
        if "norm" in part:
            return f"{match['stack']} norms"
        for ending in (".weight", ".bias", ".weight_scale", ".comfy_quant"):
            part = part.removesuffix(ending)
        return f"{match['stack']} {part.removesuffix('.0')}"
    if inner.startswith(_EMBEDDERS):
        return "embedders"
    if inner.startswith("final_layer."):
        return "final_layer"
    return "other"


def missing_tensors(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> list[tuple[str, str]]:
    """What keeps a set of tensors from being a whole Z-Image transformer.

    Args:
        shapes: name -> logical shape (that before padding, for quantised weights).
        prefix: as from `model_prefix`.

    Returns:
        (tensor, what is wrong with it), in name order. The number of blocks and the widths are
        taken from the tensors themselves.
    """
    inner = {n[len(prefix) :]: shape for n, shape in shapes.items() if n.startswith(prefix)}
    # As many blocks as there are different numbers: a stray "layers.999999." is one, not a million.
    blocks: dict[str, set[str]] = {stack: set() for stack in _STACKS}
    for name in inner:
        stack, _, rest = name.partition(".")
        number, dot, _ = rest.partition(".")
        if stack in blocks and dot and number.isdecimal():
            blocks[stack].add(number)
    counts = {stack: len(numbers) for stack, numbers in blocks.items()}
    dim, caption_dim = inner["cap_embedder.1.weight"]
    # The width that most blocks have: a single wrong one is then the one that is named.
    widths = Counter(
        shape[0]
        for name, shape in sorted(inner.items())
        if name.endswith("feed_forward.w1.weight") and len(shape) == 2 and 0 not in shape
    )
    expected = zimage_shapes(
        dim,
        counts["layers"],
        max(counts["noise_refiner"], counts["context_refiner"]),
        caption_dim,
        widths.most_common(1)[0][0] if widths else None,
    )
    problems = []
    for name, shape in expected.items():
        if name not in inner:
            problems.append((prefix + name, "is missing"))
        elif inner[name] != shape:
            problems.append((prefix + name, f"is {list(inner[name])}, not {list(shape)}"))
    return sorted(problems)
