"""CUDA graphs, one per shape of the inputs."""

from __future__ import annotations

import functools
import gc
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .inputs import ForwardInputs

Function = Callable[[ForwardInputs], list[torch.Tensor]]

_LIMIT = 4  # graphs: each keeps the memory of its activations


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: ForwardInputs
    outputs: list[torch.Tensor]


@functools.cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """Return a stream of the device: torch's own belongs to the device that captured first.

    All models share it, because torch keeps cuBLAS's workspace of every stream that was ever used.
    """
    return torch.cuda.Stream(device)


_capturing = threading.Lock()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Keep Python from freeing graphs of models that are garbage, which would end a capture.

    One capture at a time, because the switch is of the whole process.
    """
    with _capturing:
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if was_enabled:
                gc.enable()


class GraphCache:
    """Least-recently-used cache of CUDA graphs that run a function.

    The first call with a key runs the function itself, so that libraries are loaded and kernels
    chosen before a graph is captured, and so that a shape that occurs only once costs no capture.

    Args:
        has_exchanges: the function exchanges tensors with other processes.
    """

    def __init__(self, *, has_exchanges: bool = False) -> None:
        self._seen: OrderedDict[Hashable, _Captured | None] = OrderedDict()
        self._lock = threading.Lock()
        self._pool: Any = None  # a handle
        # NCCL has a thread whose calls end captures of the mode "global".
        self._error_mode = "thread_local" if has_exchanges else "global"

    def run(self, key: Hashable, function: Function, inputs: ForwardInputs) -> list[torch.Tensor]:
        """Return the function's outputs; `key` identifies everything except the inputs' values."""
        with self._lock:  # a graph's inputs and outputs are the same memory in every call
            if key not in self._seen:
                outputs = function(inputs)
                self._remember(key, None)
                return outputs
            captured = self._seen[key]
            if captured is None:
                captured = self._capture(function, inputs)
            self._remember(key, captured)
            captured.inputs.copy_(inputs)
            captured.graph.replay()
            return [output.clone() for output in captured.outputs]

    def clear(self) -> None:
        """Drop all graphs and their memory."""
        self._seen.clear()
        self._pool = None

    def _remember(self, key: Hashable, captured: _Captured | None) -> None:
        self._seen[key] = captured
        self._seen.move_to_end(key)
        while len(self._seen) > _LIMIT:
            self._seen.popitem(last=False)

    def _capture(self, function: Function, inputs: ForwardInputs) -> _Captured:
        with torch.inference_mode(False):  # tensors of that mode cannot be written to outside it
            static = inputs.map(torch.clone)
        torch.cuda.empty_cache()  # the graph has a memory pool of its own
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph, stream = torch.cuda.CUDAGraph(), _capture_stream(torch.cuda.current_device())
        # Graphs of this cache never run at the same time, so they can share one pool.
        capture = torch.cuda.graph(
            graph, pool=self._pool, stream=stream, capture_error_mode=self._error_mode
        )
        with _no_garbage_collection(), capture:
            outputs = function(static)
        return _Captured(graph, static, outputs)
