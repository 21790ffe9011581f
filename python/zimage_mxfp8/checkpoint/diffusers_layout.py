"""Diffusers' names for Z-Image's tensors, and the way to ComfyUI's.

Diffusers' `ZImageTransformer2DModel` splits `attention.qkv`, renames a few layers, and numbers the
embedders by patch size.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import replace

from ..errors import CheckpointError
from .source import Checkpoint, SourceTensor
from .zimage import PAD_TOKENS, Scope

_NAMES = (
    (re.compile(r"\.attention\.to_out\.0\."), ".attention.out."),
    (re.compile(r"\.attention\.norm_([qk])\."), r".attention.\1_norm."),
    (re.compile(r"^all_x_embedder\.2-1\."), "x_embedder."),
    (re.compile(r"^all_final_layer\.2-1\."), "final_layer."),
)
_QKV = re.compile(r"^(?P<block>.+)\.attention\.to_(?P<part>[qkv])\.(?P<kind>.+)$")
_PATCH_SIZE = re.compile(r"^all_(?:x_embedder|final_layer)\.(?P<size>[^.]+)\.")


def is_diffusers_layout(names: Collection[str], prefix: str = "") -> bool:
    """Whether the names under a prefix are those of a diffusers `ZImageTransformer2DModel`."""
    return any(name.startswith(prefix + "all_x_embedder.") for name in names)


def other_patch_size(names: Collection[str], prefix: str) -> str | None:
    """A tensor for another patch size than 2, which has no place in ComfyUI's layout."""
    for name in sorted(names):
        if name.startswith(prefix):
            match = _PATCH_SIZE.match(name[len(prefix) :])
            if match and match["size"] != "2-1":
                return name
    return None


def to_comfyui_layout(checkpoint: Checkpoint, scope: Scope) -> Checkpoint:
    """Give the model's tensors ComfyUI's names and shapes; other tensors pass unchanged.

    Renames, stacks q, k and v, and turns pad tokens [D], as stable-diffusion.cpp stores them, into
    [1, D]. Nothing is read: the stacked tensor is the three tensors' bytes one after another.

    Raises:
        CheckpointError: q, k and v are incomplete or do not fit together, or two tensors get the
            same name.
    """
    pads = {
        scope.prefix + pad: replace(tensor, shape=(1, *tensor.shape))
        for pad in PAD_TOKENS
        if (tensor := checkpoint.tensors.get(scope.prefix + pad)) and len(tensor.shape) == 1
    }
    if pads:
        checkpoint = replace(checkpoint, tensors=checkpoint.tensors | pads)
    if not is_diffusers_layout(checkpoint.tensors, scope.prefix):
        return checkpoint
    renamed: list[SourceTensor] = []
    parts: dict[tuple[str, str], dict[str, SourceTensor]] = {}
    for name, tensor in checkpoint.tensors.items():
        if not name.startswith(scope.prefix):
            renamed.append(tensor)
            continue
        if name in scope and (match := _QKV.match(name)):
            parts.setdefault((match["block"], match["kind"]), {})[match["part"]] = tensor
            continue
        inner = scope.inner(name)
        for pattern, replacement in _NAMES:
            inner = pattern.sub(replacement, inner)
        renamed.append(replace(tensor, name=scope.prefix + inner))
    for (block, kind), found in parts.items():
        renamed.append(_stack_qkv(checkpoint, f"{block}.attention", kind, found))
    tensors = {tensor.name: tensor for tensor in renamed}
    if len(tensors) < len(renamed):
        seen = Counter(tensor.name for tensor in renamed)
        twice = next(name for name, count in seen.items() if count > 1)
        raise CheckpointError(
            f'{checkpoint.path} has "{twice}" both under its own and under its diffusers name; '
            "save it again with either"
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
        raise CheckpointError(
            f'{checkpoint.path} has the scalar "{q.name}", which is not a weight; download it again'
        )
    return SourceTensor(
        f"{attention}.qkv.{kind}",
        q.dtype,
        (q.shape[0] + k.shape[0] + v.shape[0], *q.shape[1:]),
        q.segments + k.segments + v.segments,
    )
