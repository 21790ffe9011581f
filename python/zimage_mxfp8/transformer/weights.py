"""The stream of a transformer's weights from files to a device."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from .. import _core
from ..checkpoint.source import SourceTensor, TensorReader
from ..streaming.jobs import Progress, ProgressCallback

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
