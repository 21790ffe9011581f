"""Turn the tensors of an MXFP8 file of Z-Image for ComfyUI into those of SGLang's model.

Imports torch alone and is meant for copying into SGLang, whose version 0.5.23 cannot load such a
file: docs/guide/other-servers.md of this repository says what fails and where this goes.

A layer of the file has `weight`, E4M3 codes [rows, columns], and `weight_scale`, one E8M0 byte per
block of 32 columns. The bytes are in tiles of 128 rows x 4 blocks, as tensor cores take them
("blocked"). With whole tiles their shape is [rows, columns / 32], which does not show the order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

BLOCK = 32  # columns with one scale
TILE = 128  # rows of a tile of scales, and columns of the matrix beside it

# The layers for which SGLang's model takes a quantisation; it keeps all others in BF16.
_LAYER = re.compile(
    r"((?:layers|noise_refiner|context_refiner)\.\d+)\."
    r"(attention\.qkv|attention\.out|feed_forward\.w1|feed_forward\.w2|feed_forward\.w3)$"
)
_MODULES = {
    "attention.qkv": "attention.to_qkv",
    "attention.out": "attention.to_out.0",
    "feed_forward.w1": "feed_forward.w13",
    "feed_forward.w2": "feed_forward.w2",
    "feed_forward.w3": "feed_forward.w13",
}


def layer_markers(markers: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the markers of the modules that stay quantised.

    Args:
        markers: of the file, by the names of its layers, as SGLang's `inspect_comfy_quant_markers`
            returns them.

    Returns:
        Markers by the names of SGLang's modules. Layers that `convert_weights` decodes are absent.
    """
    kept = {}
    for layer, marker in markers.items():
        module = _module(layer)
        if module is not None and all(part in markers for part in _parts(layer)):
            kept[module] = dict(marker)
    return kept


def convert_weights(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and tensors that SGLang's model takes.

    Quantised layers get the names of SGLang's modules, with blocked scales as `weight_scale_inv`;
    w1 and w3 become one module. Decoded to BF16 are a quantised w1 or w3 whose partner is not, and
    layers that SGLang does not quantise, the modulations above all. Other tensors pass as they are.

    Args:
        weights: names and tensors of the file, without a prefix, in any order.

    Raises:
        ValueError: codes, scales or one of w1 and w3 are missing, codes or scales are not of
            MXFP8, a module's sizes are no multiples of 128, or w1 and w3 differ in them.
    """
    waiting: dict[tuple[str, ...], dict[str, Tensor]] = {}
    for name, tensor in weights:
        layer, _, leaf = name.rpartition(".")
        if leaf == "comfy_quant":
            continue
        if leaf not in ("weight", "weight_scale"):
            yield name, tensor
            continue
        parts = _parts(layer)
        seen = waiting.setdefault(parts, {})
        seen[name] = tensor
        if all(_is_whole(part, seen) for part in parts):
            yield from _converted(parts, waiting.pop(parts))
    if waiting:
        seen = next(iter(waiting.values()))
        raise ValueError(f"{next(iter(seen))} lacks codes, scales or the other half of its module")


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """Return a matrix in BF16, exact unless a value leaves BF16's range.

    Args:
        codes: float8_e4m3fn [rows, columns].
        scales: blocked, uint8; both sizes rounded up to whole tiles.
    """
    rows, columns = codes.shape
    factors = row_order(scales)[:rows, : columns // BLOCK].view(torch.float8_e8m0fnu).float()
    blocks = codes.float().reshape(rows, -1, BLOCK)
    return (blocks * factors.unsqueeze(2)).reshape(rows, columns).bfloat16()


def row_order(scales: Tensor) -> Tensor:
    """Return blocked scales [rows, blocks] with the bytes of each row side by side."""
    rows, blocks = scales.shape
    tiles = scales.reshape(rows // TILE, blocks // 4, 32, 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(rows, blocks)


def narrow_scales(scales: Tensor, dim: int, start: int, length: int) -> Tensor:
    """Return the blocked scales of a part of a matrix, as `torch.narrow` cuts the matrix.

    Rows of scales can be cut like rows of any tensor; columns cannot, because a tile spans four.

    Args:
        scales: of the whole matrix, [rows, columns / 32].
        dim: 0 for rows of the matrix, 1 for columns.
        start: the first one, a multiple of 128.
        length: their number, a multiple of 128.

    Raises:
        ValueError: a tile would be cut.
    """
    if start % TILE or length % TILE:
        raise ValueError(f"{start} to {start + length} cuts a tile of scales: {TILE} are one piece")
    rows, blocks = scales.shape
    tiles = scales.reshape(rows // TILE, blocks * BLOCK // TILE, -1)
    part = tiles.narrow(dim, start // TILE, length // TILE)
    return part.reshape(part.shape[0] * TILE, part.shape[1] * TILE // BLOCK)


def _module(layer: str) -> str | None:
    """Return SGLang's module for a layer of the file, if it can be quantised."""
    found = _LAYER.match(layer)
    return found and f"{found[1]}.{_MODULES[found[2]]}"


def _parts(layer: str) -> tuple[str, ...]:
    """Return the layers of the file that one module holds, by one of them."""
    if (_module(layer) or "").endswith(".w13"):
        block = layer.rpartition(".")[0]
        return f"{block}.w1", f"{block}.w3"
    return (layer,)


def _is_whole(layer: str, seen: Mapping[str, Tensor]) -> bool:
    codes = seen.get(f"{layer}.weight")
    return codes is not None and (not _is_quantised(codes) or f"{layer}.weight_scale" in seen)


def _is_quantised(weight: Tensor) -> bool:
    return weight.dtype == torch.float8_e4m3fn


def _converted(parts: tuple[str, ...], seen: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of one module."""
    weights = {part: seen[f"{part}.weight"] for part in parts}
    for part, weight in weights.items():
        if not _is_quantised(weight) and f"{part}.weight_scale" in seen:
            raise ValueError(f"{part} has scales, and codes of {weight.dtype}; MXFP8's are E4M3")
    scales = {
        part: _as_bytes(part, weight, seen[f"{part}.weight_scale"])
        for part, weight in weights.items()
        if _is_quantised(weight)
    }
    module = _module(parts[0])
    if module is not None and len(scales) == len(parts):
        for part in parts:
            _check_tiles(part, weights[part])
        if len({tuple(weight.shape) for weight in weights.values()}) > 1:
            shapes = " and ".join(f"{part} {list(weights[part].shape)}" for part in parts)
            raise ValueError(f"{shapes} become one module, and must have the same shape")
        yield f"{module}.weight", _joined(list(weights.values()))
        yield f"{module}.weight_scale_inv", _joined(list(scales.values()))
        return
    for part, weight in weights.items():
        yield f"{part}.weight", decode(weight, scales[part]) if part in scales else weight


def _as_bytes(layer: str, codes: Tensor, scales: Tensor) -> Tensor:
    """Return scales as bytes, after a check that they are blocked scales of these codes."""
    if scales.dtype not in (torch.uint8, torch.float8_e8m0fnu):
        raise ValueError(f"{layer} has scales of {scales.dtype}, and MXFP8's are E8M0 bytes")
    if codes.dim() != 2 or not codes.numel() or codes.shape[1] % BLOCK:
        raise ValueError(
            f"{layer} has codes {list(codes.shape)}, which is no matrix of whole blocks of {BLOCK} "
            "columns"
        )
    rows, columns = (-(-size // TILE) * TILE for size in codes.shape)
    if scales.shape != (rows, columns // BLOCK):
        raise ValueError(
            f"{layer} has scales {list(scales.shape)}, and blocked ones of codes "
            f"{list(codes.shape)} are {[rows, columns // BLOCK]}"
        )
    return scales.view(torch.uint8)


def _check_tiles(layer: str, codes: Tensor) -> None:
    """Check that SGLang's parameter [rows, columns / 32] has room for blocked scales."""
    if any(size % TILE for size in codes.shape):
        raise ValueError(
            f"{layer} has codes {list(codes.shape)}, and SGLang's layer takes multiples of {TILE}"
        )


def _joined(rows: list[Tensor]) -> Tensor:
    """Return matrices below each other; whole tiles of scales stay whole."""
    return rows[0] if len(rows) == 1 else torch.cat(rows)
