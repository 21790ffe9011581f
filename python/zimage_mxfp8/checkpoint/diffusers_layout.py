"""Checkpoints with diffusers' names, and their conversion to ComfyUI's.

Diffusers' `ZImageTransformer2DModel` splits some layers, renames others, and numbers the embedders
by patch size. The names are in `zimage/layers.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import replace

from ..errors import CheckpointError
from .scopes import Scope
from .source import Checkpoint, SourceTensor


def is_diffusers_layout(names: Collection[str], scope: Scope) -> bool:
    """Return whether a scope has the names of a diffusers `ZImageTransformer2DModel`."""
    return scope.table.is_diffusers_layout(_inner(names, scope))


def other_patch_size(names: Collection[str], scope: Scope) -> str | None:
    """Return a tensor for another patch size than 2, which has no place in ComfyUI's layout."""
    found = scope.table.other_patch_size(sorted(_inner(names, scope)))
    return None if found is None else scope.prefix + found


def _inner(names: Collection[str], scope: Scope) -> list[str]:
    return [scope.inner(name) for name in names if name.startswith(scope.prefix)]


def to_comfyui_layout(checkpoint: Checkpoint, scope: Scope) -> Checkpoint:
    """Give the model's tensors ComfyUI's names and shapes; other tensors pass unchanged.

    Renames, stacks what diffusers splits (q, k and v), and turns pad tokens [D], as
    stable-diffusion.cpp stores them, into [1, D]. Nothing is read: the bytes of a stacked tensor
    are those of its parts, one after another.

    Raises:
        CheckpointError: parts of a layer are missing or do not fit together, or two tensors get the
            same name.
    """
    table = scope.table
    pads = {
        scope.prefix + pad: replace(tensor, shape=(1, *tensor.shape))
        for pad in table.tokens
        if (tensor := checkpoint.tensors.get(scope.prefix + pad)) and len(tensor.shape) == 1
    }
    if pads:
        checkpoint = replace(checkpoint, tensors=checkpoint.tensors | pads)
    if not is_diffusers_layout(checkpoint.tensors, scope):
        return checkpoint
    renamed: list[SourceTensor] = []
    stacked: dict[str, tuple[str, ...]] = {}
    for name, tensor in checkpoint.tensors.items():
        if not name.startswith(scope.prefix):
            renamed.append(tensor)
            continue
        comfyui_name, parts = table.from_diffusers(scope.inner(name))
        if len(parts) > 1:
            stacked[scope.prefix + comfyui_name] = tuple(scope.prefix + part for part in parts)
        else:
            renamed.append(replace(tensor, name=scope.prefix + comfyui_name))
    renamed += [_stack(checkpoint, name, parts) for name, parts in stacked.items()]
    tensors = {tensor.name: tensor for tensor in renamed}
    if len(tensors) < len(renamed):
        seen = Counter(tensor.name for tensor in renamed)
        twice = next(name for name, count in seen.items() if count > 1)
        raise CheckpointError(
            f'{checkpoint.path} has "{twice}" both under its own and under its diffusers name; '
            "save it again with either"
        )
    return replace(checkpoint, tensors=tensors)


def _stack(checkpoint: Checkpoint, name: str, parts: tuple[str, ...]) -> SourceTensor:
    found = [checkpoint.tensors[part] for part in parts if part in checkpoint.tensors]
    for part in parts:
        if part not in checkpoint.tensors:
            raise CheckpointError(
                f'{checkpoint.path} lacks tensor "{part}", which belongs to "{found[0].name}"; '
                "download it again"
            )
    first, *others = found
    for other in others:
        fits = (first.dtype, len(first.shape), first.shape[1:])
        if (other.dtype, len(other.shape), other.shape[1:]) != fits:
            raise CheckpointError(
                f"{checkpoint.path} has tensors that cannot be stacked: "
                f'"{first.name}" is {first.dtype} {list(first.shape)}, '
                f'"{other.name}" is {other.dtype} {list(other.shape)}'
            )
    if not first.shape:
        raise CheckpointError(
            f'{checkpoint.path} has the scalar "{first.name}", which is not a weight; '
            "download it again"
        )
    return SourceTensor(
        name,
        first.dtype,
        (sum(tensor.shape[0] for tensor in found), *first.shape[1:]),
        tuple(segment for tensor in found for segment in tensor.segments),
    )
