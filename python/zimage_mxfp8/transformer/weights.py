"""Reading a transformer's weights: all checks first, then a stream to the device."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from .. import _core
from ..checkpoint import quantization as marks
from ..checkpoint.mxfp8_layers import MXFP8Layer, find_layers
from ..checkpoint.source import Checkpoint, SourceTensor, TensorReader, open_checkpoint
from ..checkpoint.zimage import (
    is_diffusers_layout,
    missing_essentials,
    missing_tensors,
    model_prefix,
    to_comfyui_layout,
    zimage_shapes,
)
from ..dtypes import FLOAT_NAMES
from ..errors import CheckpointError
from ..pipeline import Progress, ProgressCallback
from ..text import plural
from .config import HEAD_DIM, ZImageConfig

_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.uint8,
    "U8": torch.uint8,
}
_CHUNK = 8 << 20
_WORKERS = 8
_BUFFERS = 2  # of pinned memory for each worker


@dataclass(frozen=True)
class ModelFile:
    """A checkpoint that holds a whole Z-Image transformer.

    Attributes:
        tensors: by name without prefix, in the ComfyUI layout.
        layers: the MXFP8 layers, by name without prefix.
    """

    checkpoint: Checkpoint
    config: ZImageConfig
    tensors: dict[str, SourceTensor]
    layers: dict[str, MXFP8Layer]

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of the weights in memory, floating-point ones in `dtype`."""
        total = 0
        for tensor in self.tensors.values():
            if tensor.dtype in FLOAT_NAMES:
                total += tensor.nbytes * dtype.itemsize // _DTYPES[tensor.dtype].itemsize
            elif not tensor.name.endswith(marks.MARKER_SUFFIX):
                total += tensor.nbytes
        return total


def open_model(path: str | os.PathLike[str]) -> ModelFile:
    """Look at a checkpoint's headers and markers.

    Args:
        path: an MXFP8 or plain single file, or a diffusers folder.

    Raises:
        CheckpointError: unreadable, not Z-Image, incomplete, or quantised in a way that cannot be
            run; the sentence names the tensor.
    """
    checkpoint = open_checkpoint(Path(path))
    if is_diffusers_layout(checkpoint.tensors):
        if found := marks.quantized_format(checkpoint, ""):
            raise CheckpointError(
                f'{path} is in the diffusers layout and quantised ("{found[1]}"), a mixture that '
                "loses scales; convert the original to a single MXFP8 file"
            )
        checkpoint = to_comfyui_layout(checkpoint)
    if lacking := missing_essentials(checkpoint.tensors):
        raise CheckpointError(
            f'{path} is no Z-Image transformer: it lacks tensor "{lacking[0]}" (the first that it '
            f'has is "{min(checkpoint.tensors)}"); name a ComfyUI file or a diffusers folder of '
            "Z-Image"
        )
    layers, breaches = find_layers(checkpoint)
    if breaches:
        count = plural(len(breaches), "problem")
        raise CheckpointError(f"{path}: {breaches[0]} ({count} in all)")
    prefix = model_prefix(checkpoint.tensors)
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    shapes.update({layer.weight.name: layer.shape for layer in layers})
    _check_shapes(path, shapes, prefix)
    quantized = {layer.weight.name for layer in layers}
    tensors = {
        name.removeprefix(prefix): tensor
        for name, tensor in checkpoint.tensors.items()
        if name.startswith(prefix)
    }
    for tensor in tensors.values():
        is_float = tensor.dtype in FLOAT_NAMES or tensor.name in quantized
        if not is_float and not tensor.name.endswith((marks.MARKER_SUFFIX, marks.SCALE_SUFFIX)):
            raise CheckpointError(
                f'{path}: "{tensor.name}" is {tensor.dtype}, which this package cannot run; '
                "convert the original checkpoint"
            )
    config = ZImageConfig.of_shapes({name.removeprefix(prefix): s for name, s in shapes.items()})
    by_name = {layer.name.removeprefix(prefix): layer for layer in layers}
    _check_no_more(path, tensors, config, by_name)
    return ModelFile(checkpoint, config, tensors, by_name)


def _check_shapes(
    path: str | os.PathLike[str], shapes: Mapping[str, tuple[int, ...]], prefix: str
) -> None:
    name = prefix + "cap_embedder.1.weight"
    shape = shapes[name]
    if len(shape) != 2 or 0 in shape or shape[0] % HEAD_DIM != 0:
        raise CheckpointError(
            f'{path}: "{name}" is {list(shape)}, not [dim, caption features] with dim a multiple '
            f"of {HEAD_DIM}"
        )
    problems = missing_tensors(shapes, prefix)
    if problems:
        tensor, problem = problems[0]
        raise CheckpointError(
            f'{path}: "{tensor}" {problem} ({plural(len(problems), "problem")} in all); download '
            "or convert the checkpoint again"
        )


def _check_no_more(
    path: str | os.PathLike[str],
    tensors: Mapping[str, SourceTensor],
    config: ZImageConfig,
    layers: Mapping[str, MXFP8Layer],
) -> None:
    """Refuse what a Z-Image transformer does not have: a bias or an adapter would be left out."""
    known = set(
        zimage_shapes(
            config.dim,
            config.n_layers,
            config.n_refiner_layers,
            config.cap_feat_dim,
            config.hidden_dim,
        )
    )
    for layer in layers:
        known |= {layer + suffix for suffix in (marks.SCALE_SUFFIX, marks.MARKER_SUFFIX)}
    modules = {name.partition(".")[0] for name in zimage_shapes()}  # with stacks that are empty
    for name, tensor in tensors.items():
        if name not in known and name.partition(".")[0] in modules:
            raise CheckpointError(
                f'{path}: "{tensor.name}" is no part of a Z-Image transformer, and would change '
                "what it computes; merge adapters into the weights first, or take it out"
            )


@dataclass(frozen=True)
class Loading:
    """Tensors that are being loaded, by key, and the chunks that are read for them."""

    tensors: dict[str, torch.Tensor]
    chunks: list[Future[tuple[SourceTensor, int]]]


class TensorStream:
    """Brings tensors from files to a device with bounded host memory.

    Workers read chunks into pinned memory, from where they are copied while the next are read.
    On the CPU they read straight into the tensors.
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
        """Begin to load tensors, each of one or several of a file, stacked along the first axis."""
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
        if self._copies is not None:  # the tensors' memory may be in use until here
            self._copies.wait_stream(torch.cuda.current_stream(self._device))
        return Loading(tensors, [self._pool.submit(self._run, job) for job in jobs])

    def finish(self, loading: Loading) -> dict[str, torch.Tensor]:
        """The tensors, once they are on their way; work on the current stream sees them whole."""
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
