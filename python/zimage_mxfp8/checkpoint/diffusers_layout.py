"""Checkpoints with diffusers' names, and their conversion to ComfyUI's and back.

Diffusers' `ZImageTransformer2DModel` splits some layers, renames others, and numbers the embedders
by patch size. The names are in `zimage/layers.py`. In diffusers' layout MXFP8 layers are described
in the header only; there are no marker tensors, which diffusers would report as unknown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from ..errors import CheckpointError
from ..layout import SCALE_TILE_ROWS
from . import kinds
from . import quantization as markers
from .kinds import Kind
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


def has_scales_to_stack(checkpoint: Checkpoint, form: Kind) -> bool:
    """Return whether a quantised checkpoint in diffusers' layout has one in ComfyUI's."""
    has_markers = any(name.endswith(markers.MARKER_SUFFIX) for name in checkpoint.tensors)
    return form is kinds.MXFP8 and markers.HEADER_KEY in checkpoint.metadata and not has_markers


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
    return replace(checkpoint, tensors=tensors, metadata=_comfyui_metadata(checkpoint, scope))


def to_diffusers_layout(checkpoint: Checkpoint, scope: Scope) -> Checkpoint:
    """Give a model's tensors diffusers' names, without prefix; leave out all others and markers.

    Splits what diffusers does not stack. Nothing is read. The metadata is unchanged.

    Args:
        checkpoint: in ComfyUI's layout.
        scope: the model's tensors.

    Raises:
        CheckpointError: a layer has too few rows to be split together with its blocked scales.
    """
    tensors: dict[str, SourceTensor] = {}
    for inner, name in scope.inner_names(checkpoint.tensors).items():
        if inner.endswith(markers.MARKER_SUFFIX):
            continue
        tensor, parts = checkpoint.tensors[name], scope.table.to_diffusers(inner)
        if len(parts) == 1:
            tensors[parts[0]] = replace(tensor, name=parts[0])
            continue
        rows = tensor.shape[0] // len(parts)
        _check_tiles(checkpoint, tensor, rows)
        for i, part in enumerate(parts):
            tensors[part] = tensor.rows(part, i * rows, (i + 1) * rows)
    return replace(checkpoint, tensors=tensors)


def _check_tiles(checkpoint: Checkpoint, tensor: SourceTensor, rows: int) -> None:
    """Raise if codes or scales of a part of a layer are not contiguous in the whole."""
    if tensor.dtype in ("F8_E4M3", *markers.SCALE_DTYPES) and rows % SCALE_TILE_ROWS:
        raise CheckpointError(
            f'{checkpoint.path}: "{tensor.name}" belongs to a layer that diffusers splits, and '
            f"blocked scales can be split and stacked at multiples of {SCALE_TILE_ROWS} rows only",
            "keep the layer in BF16 when you quantise the original (`exclude_layers`)",
        )


def _comfyui_metadata(checkpoint: Checkpoint, scope: Scope) -> dict[str, str]:
    """Return the metadata with the descriptions of layers under ComfyUI's names."""
    described = markers.header_layers(checkpoint.metadata.get(markers.HEADER_KEY, ""))
    if not described:
        return checkpoint.metadata
    layers: dict[str, Any] = {}
    for name, entry in described.items():
        inner = scope.inner(name) if name.startswith(scope.prefix) else name
        prefix = name.removesuffix(inner)
        ours, parts = scope.table.from_diffusers(inner + markers.WEIGHT_SUFFIX)
        others = [described.get(prefix + x.removesuffix(markers.WEIGHT_SUFFIX)) for x in parts]
        key = prefix + ours.removesuffix(markers.WEIGHT_SUFFIX)
        layers[key] = _stacked_entry(checkpoint, name, entry, others)
    return checkpoint.metadata | {markers.HEADER_KEY: markers.header_value(layers)}


def _stacked_entry(checkpoint: Checkpoint, name: str, entry: Any, parts: list[Any]) -> Any:
    """Return the description of a layer that is stacked from layers with these descriptions."""
    if len(parts) == 1:
        return entry
    if any(part != entry for part in parts):
        raise CheckpointError(
            f'{checkpoint.path} describes "{name}" otherwise than the layers that ComfyUI stacks '
            "it with; quantise the original again"
        )
    shape = entry.get("orig_shape") if isinstance(entry, Mapping) else None
    if isinstance(shape, list) and len(shape) == 2 and isinstance(shape[0], int):
        return {**entry, "orig_shape": [shape[0] * len(parts), shape[1]]}
    return entry


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
                f'"{other.name}" is {other.dtype} {list(other.shape)}; download it again'
            )
    if not first.shape:
        raise CheckpointError(
            f'{checkpoint.path} has the scalar "{first.name}", which is not a weight; '
            "download it again"
        )
    for part_tensor in found:
        _check_tiles(checkpoint, part_tensor, part_tensor.shape[0])
    return SourceTensor(
        name,
        first.dtype,
        (sum(tensor.shape[0] for tensor in found), *first.shape[1:]),
        tuple(segment for tensor in found for segment in tensor.segments),
    )
