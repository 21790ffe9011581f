"""Adapters of a transformer on several devices."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..lora import Lora, LoraSet, Weight
from .peers import Peers


class SharedLoraSet(LoraSet):
    """The adapters of rank 0's transformer; what changes them is done on all ranks.

    Rank 0 comes first: what it refuses changes nothing anywhere.
    """

    def __init__(self, peers: Peers, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._peers = peers

    def load(
        self,
        source: str | os.PathLike[str] | Mapping[str, Any],
        name: str | None = None,
        weight: Weight = 1.0,
        metadata: Mapping[str, Any] | None = None,
    ) -> Lora:
        """Load an adapter."""
        lora = super().load(source, name, weight, metadata)
        self._peers.change_adapters("load", _portable(source), lora.name, weight, metadata)
        return lora

    def replace(
        self,
        source: str | os.PathLike[str] | Mapping[str, Any],
        name: str | None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Lora:
        """Load an adapter in place of one."""
        lora = super().replace(source, name, metadata)
        self._peers.change_adapters("replace", _portable(source), name, metadata)
        return lora

    def set(self, weights: Mapping[str, Weight]) -> None:
        """Set weights."""
        super().set(weights)
        self._peers.change_adapters("set", dict(weights))

    def unload(self, name: str) -> None:
        """Take an adapter off."""
        super().unload(name)
        self._peers.change_adapters("unload", name)

    def unload_all(self) -> None:
        """Take all adapters off."""
        super().unload_all()
        self._peers.change_adapters("unload_all")

    def enable(self, enabled: bool) -> None:
        """Let adapters count, or none of them."""
        super().enable(enabled)
        self._peers.change_adapters("enable", enabled)

    def fuse(self, scale: float, names: Sequence[str] | None = None) -> None:
        """Fix adapters."""
        super().fuse(scale, names)
        self._peers.change_adapters("fuse", scale, names)

    def unfuse(self) -> None:
        """End what `fuse` did."""
        super().unfuse()
        self._peers.change_adapters("unfuse")

    def place(self, name: str, device: torch.device) -> None:
        """Keep an adapter with the model, or in host memory alone."""
        super().place(name, device)
        self._peers.change_adapters("place", name, device)


def _portable(source: str | os.PathLike[str] | Mapping[str, Any]) -> Any:
    """Return an adapter's source for another process, which has other tensors on its device."""
    if not isinstance(source, Mapping):
        return os.fspath(source)
    return {
        key: value.cpu() if isinstance(value, torch.Tensor) else value
        for key, value in source.items()
    }
