"""The module by which diffusers' pipelines see which adapters a transformer has. Imports peft."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .lora import LoraSet


class AdapterMarker(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """Stands for all layers with adapters, where pipelines look for PEFT's layers.

    Diffusers reads active and merged adapters from such layers, and calls them to unmerge and to
    move adapters between devices.
    """

    def __init__(self, loras: LoraSet) -> None:
        super().__init__()
        self._loras = loras

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that count."""
        return self._loras.active

    @property
    def merged_adapters(self) -> list[str]:
        """Names of the adapters that are fused."""
        return [name for name in self._loras.fused if name in self._loras.listed]

    def unmerge(self) -> None:
        """End what `fuse_lora` did."""
        self._loras.unfuse()

    @property
    def lora_A(self) -> Mapping[str, Any]:  # noqa: N802 - PEFT's name
        """By name what moves an adapter with `to(device)`."""
        return _Movers(self._loras)

    @property
    def lora_B(self) -> Mapping[str, Any]:  # noqa: N802
        """The same as `lora_A`."""
        return _Movers(self._loras)


class _Movers(Mapping[str, Any]):
    def __init__(self, loras: LoraSet) -> None:
        self._loras = loras

    def __getitem__(self, name: str) -> Any:
        return _Mover(self._loras, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._loras.listed)

    def __len__(self) -> int:
        return len(self._loras.listed)


class _Mover:
    def __init__(self, loras: LoraSet, name: str) -> None:
        self._loras, self._name = loras, name

    def to(self, device: torch.device | str | int) -> None:
        self._loras.place(self._name, torch.device(device))
