"""A Z-Image file as a ComfyUI MODEL, read by this package's own reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..checkpoint.int8_storage import Int8Layer
from ..checkpoint.quantization import (
    MARKER_SUFFIX,
    SCALE_SUFFIX,
    WEIGHT_SUFFIX,
    int8_marker,
    layer_marker,
    marker_bytes,
)
from ..checkpoint.quantized_layers import QuantizedLayer
from ..errors import UnsupportedError
from ..streaming.jobs import ProgressCallback
from ..transformer.model_file import ModelFile, open_model
from ..transformer.weights import TensorStream
from ..zimage.config import ZImageConfig
from ..zimage.layers import ZIMAGE


def load_model(path: str | Path, progress: ProgressCallback | None = None) -> Any:
    """Return a ModelPatcher with the weights of a file, in host memory.

    The 8-bit weights are read once, to the memory that ComfyUI's layers and this package's blocks
    share: w1 and w3 of a block follow one another. Dynamic VRAM, which would stream them, is off
    for this MODEL.

    Args:
        path: a file that `ZImageTransformer.from_checkpoint` takes, of ComfyUI's sizes.
        progress: called with a `Progress` while weights are read.

    Raises:
        CheckpointError: unreadable, not Z-Image, incomplete, or quantised in another way; the
            sentence names the tensor.
        UnsupportedError: ComfyUI does not know a model of these sizes.
    """
    from comfy.sd import load_diffusion_model_state_dict

    state = read_state(open_model(path), progress)
    model = load_diffusion_model_state_dict(state, disable_dynamic=True)
    if model is None:
        raise UnsupportedError(f"ComfyUI knows no model of the sizes of {path}")
    model.cached_patcher_init = (_load_again, (path,))
    return model


def _load_again(path: str | Path, *, disable_dynamic: bool = True) -> Any:  # noqa: ARG001
    """Load a file for a copy with weights of its own; ComfyUI passes the keyword."""
    return load_model(path)


def read_state(
    file: ModelFile[ZImageConfig], progress: ProgressCallback | None = None
) -> dict[str, torch.Tensor]:
    """Read a file: its tensors and markers by name, as ComfyUI's Z-Image has them."""
    sources = {name: [tensor] for name, tensor in file.tensors.items()}
    sources |= {f"{name}{SCALE_SUFFIX}": [x.scale] for name, x in file.layers.items()}
    pairs = _pairs(file)
    for first, second in pairs:
        sources[first] += sources.pop(second)
    total = sum(part.nbytes for parts in sources.values() for part in parts)
    with TensorStream(torch.device("cpu"), total, progress) as stream:
        state = stream.finish(stream.start(sources))
    for first, second in pairs:
        rows = sources[first][0].shape[0]
        state[first], state[second] = state[first][:rows], state[first][rows:]
    for name, layer in file.layers.items():
        if not isinstance(layer, Int8Layer):
            weight = name + WEIGHT_SUFFIX
            state[weight] = state[weight].view(torch.float8_e4m3fn)
        state[name + MARKER_SUFFIX] = torch.frombuffer(
            bytearray(marker_bytes(_marker(layer))), dtype=torch.uint8
        )
    return state


def _pairs(file: ModelFile[ZImageConfig]) -> list[tuple[str, str]]:
    """Return the names of the codes, and of the scales, that shall follow one another."""
    first, second = (layer.name for layer in ZIMAGE.linears()["ffn_in"])
    pairs = []
    for name in file.layers:
        other = name.removesuffix(first) + second
        if not name.endswith(first) or other not in file.layers:
            continue
        pairs += [(name + suffix, other + suffix) for suffix in (WEIGHT_SUFFIX, SCALE_SUFFIX)]
    return pairs


def _marker(layer: QuantizedLayer) -> dict[str, Any]:
    if isinstance(layer, Int8Layer):
        return int8_marker(layer.group, full_precision=layer.full_precision)
    return layer_marker(layer.shape, full_precision=layer.full_precision)
