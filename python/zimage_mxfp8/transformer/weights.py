"""Reading of a transformer's weights: all checks first, then a stream to the device."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from .. import _core
from ..checkpoint.controlnets import control_config
from ..checkpoint.find_layers import find_layers
from ..checkpoint.identify import Identified, open_for
from ..checkpoint.int8_storage import Int8Layer
from ..checkpoint.kinds import Use
from ..checkpoint.quantized_layers import QuantizedLayer
from ..checkpoint.source import Checkpoint, SourceTensor, TensorReader
from ..checkpoint.structure import missing_or_misshapen, structure_error, unknown_parameters
from ..dtypes import FLOAT_NAMES
from ..errors import CheckpointError
from ..streaming.jobs import Progress, ProgressCallback
from ..text import plural
from ..zimage.config import ZImageConfig
from ..zimage.constants import HEAD_DIM
from ..zimage.control import REFINER, ControlConfig
from .compute import Weights

_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.uint8,
    "U8": torch.uint8,
    "F8_E8M0": torch.uint8,
    "I8": torch.int8,
}
_CHUNK = 8 << 20
_WORKERS = 8
_BUFFERS = 2  # of pinned memory per worker


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

    @property
    def weights(self) -> Weights:
        """What the layers are stored in."""
        is_int8 = any(isinstance(layer, Int8Layer) for layer in self.layers.values())
        return "int8-convrot" if is_int8 else "mxfp8" if self.layers else "plain"

    def nbytes(self, dtype: torch.dtype) -> int:
        """Return the bytes of the weights in memory, floating-point ones in `dtype`."""
        total = 0
        for tensor in self.tensors.values():
            if tensor.dtype in FLOAT_NAMES:
                total += tensor.nbytes * dtype.itemsize // _DTYPES[tensor.dtype].itemsize
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
            f"dim a multiple of {HEAD_DIM}"
        )
    tensors = {name: inner[name] for name in table.expected_shapes(shapes)}
    for source in tensors.values():
        if source.dtype not in FLOAT_NAMES and source.name not in padded:
            raise CheckpointError(
                f'{path}: "{source.name}" is {source.dtype}, which this package cannot run; '
                "save it as BF16, F16 or F32"
            )
    return _Structure(checkpoint, shapes, tensors, layers)


@dataclass(frozen=True)
class Loading:
    """Tensors that are being loaded, by key, and the chunks that are read for them."""

    tensors: dict[str, torch.Tensor]
    chunks: list[Future[tuple[SourceTensor, int]]]


class TensorStream:
    """A stream of tensors from files to a device, with bounded host memory.

    Workers read chunks into pinned memory; these are copied to the device while the next are read.
    On the CPU they read directly into the tensors.
    """

    def __init__(self, device: torch.device, total: int, progress: ProgressCallback | None) -> None:
        self._device = device
        self._total, self._done = total, 0
        self._progress = progress
        self._local = threading.local()
        self._readers: list[TensorReader] = []
        self._pool = ThreadPoolExecutor(min(_WORKERS, _core.default_threads() + 1))
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, stacks: Mapping[str, Sequence[SourceTensor]]) -> Loading:
        """Begin to load tensors, each from one or several of a file, stacked along axis 0."""
        tensors, jobs = {}, []
        for key, parts in stacks.items():
            shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
            tensor = torch.empty(shape, dtype=_DTYPES[parts[0].dtype], device=self._device)
            tensors[key] = tensor
            flat, at = tensor.reshape(-1).view(torch.uint8), 0
            for part in parts:
                for begin in range(0, part.nbytes, _CHUNK):
                    count = min(_CHUNK, part.nbytes - begin)
                    jobs.append((part, begin, flat[at + begin : at + begin + count]))
                at += part.nbytes
        if self._copies is not None:  # the tensors' memory may be in use until now
            self._copies.wait_stream(torch.cuda.current_stream(self._device))
        return Loading(tensors, [self._pool.submit(self._run, job) for job in jobs])

    def finish(self, loading: Loading) -> dict[str, torch.Tensor]:
        """Return the tensors once their copies are queued; the current stream waits for them."""
        for chunk in loading.chunks:
            part, nbytes = chunk.result()
            self._done += nbytes
            if self._progress is not None:
                self._progress(Progress(self._done, self._total, part.name))
        if self._copies is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._copies)
        return loading.tensors

    def _run(self, job: tuple[SourceTensor, int, torch.Tensor]) -> tuple[SourceTensor, int]:
        part, begin, target = job
        if not hasattr(self._local, "reader"):
            self._local.reader = TensorReader()
            self._readers.append(self._local.reader)
            self._local.turn = 0
            if self._copies is not None:
                self._local.buffers = [
                    torch.empty(_CHUNK, dtype=torch.uint8, pin_memory=True) for _ in range(_BUFFERS)
                ]
                self._local.events = [torch.cuda.Event() for _ in range(_BUFFERS)]
        if self._copies is None:
            self._local.reader.read_into(part, begin, _bytes_of(target))
            return part, target.numel()
        turn = self._local.turn = (self._local.turn + 1) % _BUFFERS
        buffer = self._local.buffers[turn][: target.numel()]
        self._local.events[turn].synchronize()
        self._local.reader.read_into(part, begin, _bytes_of(buffer))
        with torch.cuda.stream(self._copies):
            target.copy_(buffer, non_blocking=True)
            self._local.events[turn].record(self._copies)
        return part, target.numel()

    def close(self) -> None:
        """End the workers and close the files."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for reader in self._readers:
            reader.close()

    def __enter__(self) -> TensorStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _bytes_of(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    view: npt.NDArray[np.uint8] = tensor.numpy()
    return view
