"""Checkpoints that can be run: all checks of their headers and markers, without torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from ..checkpoint.controlnets import control_config
from ..checkpoint.find_layers import find_layers
from ..checkpoint.identify import Identified, open_for
from ..checkpoint.int8_storage import Int8Layer
from ..checkpoint.kinds import Use
from ..checkpoint.quantized_layers import QuantizedLayer
from ..checkpoint.source import Checkpoint, SourceTensor
from ..checkpoint.structure import missing_or_misshapen, structure_error, unknown_parameters
from ..dtypes import FLOAT_NAMES, SAFETENSORS_BITS
from ..errors import CheckpointError
from ..text import plural
from ..zimage.config import ZImageConfig
from ..zimage.constants import HEAD_DIM
from ..zimage.control import REFINER, ControlConfig
from .compute import Weights

Config = TypeVar("Config", ZImageConfig, ControlConfig)


@dataclass(frozen=True)
class ModelFile(Generic[Config]):
    """A checkpoint that holds a whole Z-Image transformer, or a ControlNet for one.

    Attributes:
        config: the sizes of the model.
        tensors: the model's tensors, by name without prefix, in the ComfyUI layout.
        layers: the quantised layers, by name without prefix.
    """

    checkpoint: Checkpoint
    config: Config
    tensors: dict[str, SourceTensor]
    layers: dict[str, QuantizedLayer]

    @property
    def path(self) -> str:
        """The file or folder."""
        return str(self.checkpoint.path)

    def state(self) -> tuple[tuple[int, ...], ...]:
        """Return which files these are now: device, inode, size and time of each."""
        found = [path.stat() for path in self.checkpoint.files]
        return tuple((each.st_dev, each.st_ino, each.st_size, each.st_mtime_ns) for each in found)

    def check_state(self, state: tuple[tuple[int, ...], ...]) -> None:
        """Check that the files have not changed since an earlier `state()`.

        Raises:
            CheckpointError: they have.
        """
        if self.state() != state:
            raise CheckpointError(f"{self.path} was replaced while it was loaded", "load it again")

    @property
    def weights(self) -> Weights:
        """What the layers are stored in."""
        is_int8 = any(isinstance(layer, Int8Layer) for layer in self.layers.values())
        return "int8-convrot" if is_int8 else "mxfp8" if self.layers else "plain"

    def nbytes(self, itemsize: int) -> int:
        """Return the bytes of the weights in memory, with `itemsize` bytes per plain number."""
        total = 0
        for tensor in self.tensors.values():
            if tensor.dtype in FLOAT_NAMES:
                total += tensor.nbytes * 8 * itemsize // SAFETENSORS_BITS[tensor.dtype]
            else:
                total += tensor.nbytes
        return total + sum(layer.scale.nbytes for layer in self.layers.values())


def open_model(path: str | os.PathLike[str], use: Use = "run") -> ModelFile[ZImageConfig]:
    """Check a checkpoint's headers and markers, and open it.

    Args:
        path: a single file, MXFP8, INT8 ConvRot or plain, or a diffusers folder.
        use: the purpose.

    Raises:
        CheckpointError: unreadable, not Z-Image, incomplete, or quantised in a way that cannot be
            run; the sentence names the tensor.
    """
    parts = _read_structure(path, open_for(path, use))
    return ModelFile(
        parts.checkpoint, ZImageConfig.of_shapes(parts.shapes), parts.tensors, parts.layers
    )


def open_control(path: str | os.PathLike[str]) -> ModelFile[ControlConfig]:
    """Look at a ControlNet's headers and markers; reads one bias.

    Args:
        path: a file, MXFP8, INT8 ConvRot or plain.

    Raises:
        CheckpointError: unreadable, not a ControlNet for Z-Image, incomplete, or quantised in a way
            that cannot be run; the sentence names the tensor.
    """
    found = open_for(path, "control")
    parts = _read_structure(path, found)
    config = control_config(found, parts.shapes)
    unused = () if config.n_refiner_layers else (f"{REFINER}.",)
    return ModelFile(
        parts.checkpoint,
        config,
        {name: x for name, x in parts.tensors.items() if not name.startswith(unused)},
        {name: x for name, x in parts.layers.items() if not name.startswith(unused)},
    )


class _Structure(NamedTuple):
    checkpoint: Checkpoint
    shapes: dict[str, tuple[int, ...]]  # before padding, by name without prefix
    tensors: dict[str, SourceTensor]
    layers: dict[str, QuantizedLayer]


def _read_structure(path: str | os.PathLike[str], found: Identified) -> _Structure:
    checkpoint, scope, table = found.checkpoint, found.scope, found.scope.table
    quantized = find_layers(found)
    if breaches := quantized.breaches:
        count = plural(len(breaches), "problem")
        raise CheckpointError(f"{path}: {breaches[0]} ({count} in all)")
    padded = {layer.weight.name: layer.shape for layer in quantized.layers}
    if problems := missing_or_misshapen(checkpoint, scope, padded, for_comfyui=False):
        raise structure_error(checkpoint, scope, problems)
    if problems := unknown_parameters(checkpoint, scope):
        tensor, problem = problems[0]
        raise CheckpointError(
            f'{path}: "{tensor}" {problem}; merge adapters into the weights first, or take it out'
        )
    layers = {scope.inner(layer.name): layer for layer in quantized.layers}
    inner = {
        i: checkpoint.tensors[name] for i, name in scope.inner_names(checkpoint.tensors).items()
    }
    shapes = {name: tensor.shape for name, tensor in inner.items()}
    shapes |= {scope.inner(name): shape for name, shape in padded.items()}
    anchor = shapes[table.anchor]
    if anchor[0] % HEAD_DIM:
        raise CheckpointError(
            f'{path}: "{scope.prefix}{table.anchor}" is {list(anchor)}, not [dim, features] with '
            f"dim a multiple of {HEAD_DIM}; download the checkpoint again"
        )
    tensors = {name: inner[name] for name in table.expected_shapes(shapes)}
    for source in tensors.values():
        if source.dtype not in FLOAT_NAMES and source.name not in padded:
            raise CheckpointError(
                f'{path}: "{source.name}" is {source.dtype}, which this package cannot run; '
                "save it as BF16, F16 or F32"
            )
    return _Structure(checkpoint, shapes, tensors, layers)
