"""Adapters beside the linear layers of ComfyUI's own forward, for calls that fall back to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..adapters.branches import Matrix
from ..adapters.files import open_adapter
from .patches import AdapterTensors

Shapes = Mapping[str, tuple[int, ...]]


class _Branch:
    """What an adapter adds to some rows of a layer: strength (x A^T) B^T, or strength x B^T.

    The matrices are copied to the device and dtype of x once, see `forget`.
    """

    def __init__(self, rows: slice, factors: Sequence[Matrix], strength: float) -> None:
        """Take A and B, or B alone, from host memory."""
        self._rows, self._strength = rows, strength
        self._factors = [torch.from_numpy(np.ascontiguousarray(matrix)) for matrix in factors]
        self._copies: list[torch.Tensor] = []

    def add_to(self, result: torch.Tensor, x: torch.Tensor) -> None:
        """Add it to a layer's result, in place."""
        copies = self._copies
        if not copies or (copies[0].device, copies[0].dtype) != (x.device, x.dtype):
            self._copies = copies = [factor.to(x) for factor in self._factors]
        for factor in copies:
            x = F.linear(x, factor)
        result[..., self._rows] += self._strength * x

    def forget(self) -> None:
        """Drop the copies, so that their memory is free."""
        self._copies = []


class Branches:
    """All adapters of a model, by layer."""

    def __init__(self, adapters: Mapping[str, AdapterTensors], shapes: Shapes) -> None:
        """Read the adapters; `shapes` are those of the model's tensors by name."""
        self._of_layer: dict[str, list[_Branch]] = {}
        for adapter in adapters.values():
            for module, branch in open_adapter(adapter.tensors, shapes).branches():
                target = module.target
                if branch.matrix is None:
                    continue  # ComfyUI keeps changes of biases, see patches.py
                rows = target.rows(shapes[f"{target.layer}.weight"][0])
                low = branch.matrix.low_rank()
                factors = (branch.matrix.dense(),) if low is None else (low.down, low.up)
                self._of_layer.setdefault(target.layer, []).append(
                    _Branch(rows, factors, adapter.strength)
                )

    @contextmanager
    def beside(self, module: Any) -> Iterator[None]:
        """Add the branches to the layers of ComfyUI's NextDiT for a while."""
        with ExitStack() as stack:
            for layer, branches in self._of_layer.items():
                hook = module.get_submodule(layer).register_forward_hook(_hook(branches))
                stack.callback(hook.remove)
            yield

    def forget(self) -> None:
        """Drop the copies of matrices on the device; the next call makes new ones."""
        for branches in self._of_layer.values():
            for branch in branches:
                branch.forget()


def _hook(branches: list[_Branch]) -> Any:
    def add(_: Any, given: tuple[torch.Tensor, ...], result: torch.Tensor) -> torch.Tensor:
        total = result.clone()
        for branch in branches:
            branch.add_to(total, given[0])
        return total

    return add
