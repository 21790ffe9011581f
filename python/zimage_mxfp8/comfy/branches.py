"""Adapters beside the linear layers of ComfyUI's own forward, for calls that fall back to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..adapters.branches import Matrix
from ..adapters.files import open_adapter
from .patches import AdapterTensors

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class _Branch:
    """What an adapter adds to some rows of a layer: strength (x down^T) up^T, or x up^T."""

    rows: slice
    down: torch.Tensor | None
    up: torch.Tensor
    strength: float

    def add_to(self, result: torch.Tensor, x: torch.Tensor) -> None:
        """Add it to a layer's result, in place."""
        up = self.up.to(x)
        narrow = x if self.down is None else F.linear(x, self.down.to(x))
        result[..., self.rows] += self.strength * F.linear(narrow, up)


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
                down, up = (None, branch.matrix.dense()) if low is None else (low.down, low.up)
                self._of_layer.setdefault(target.layer, []).append(
                    _Branch(
                        rows, None if down is None else _tensor(down), _tensor(up), adapter.strength
                    )
                )

    @contextmanager
    def beside(self, module: Any) -> Iterator[None]:
        """Add the branches to the layers of ComfyUI's NextDiT for a while."""
        with ExitStack() as stack:
            for layer, branches in self._of_layer.items():
                hook = module.get_submodule(layer).register_forward_hook(_hook(branches))
                stack.callback(hook.remove)
            yield


def _hook(branches: list[_Branch]) -> Any:
    def add(_: Any, given: tuple[torch.Tensor, ...], result: torch.Tensor) -> torch.Tensor:
        total = result.clone()
        for branch in branches:
            branch.add_to(total, given[0])
        return total

    return add


def _tensor(matrix: Matrix) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(matrix))
