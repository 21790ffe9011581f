"""Adapters of a transformer on several devices."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..lora import Lora, LoraSet, Weight, check_weight
from .other_ranks import OtherRanks


class SharedLoraSet(LoraSet):
    """The adapters of rank 0's transformer; what changes them is done on all ranks.

    Rank 0 comes first: what it refuses changes nothing anywhere.
    """

    def __init__(self, others: OtherRanks, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._others = others

    def load(
        self,
        source: str | os.PathLike[str] | Mapping[str, Any],
        name: str | None = None,
        weight: Weight = 1.0,
        metadata: Mapping[str, Any] | None = None,
    ) -> Lora:
        """Load an adapter."""
        name, weight = self._new_name(name), check_weight("weight", weight)
        arguments = _portable(source), name, weight, _plain(metadata)
        with self._others.change_adapters("load", *arguments):
            return super().load(source, name, weight, metadata)

    def replace(
        self,
        source: str | os.PathLike[str] | Mapping[str, Any],
        name: str | None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Lora:
        """Load an adapter in place of one."""
        arguments = _portable(source), name, _plain(metadata)
        with self._others.change_adapters("replace", *arguments):
            return super().replace(source, name, metadata)

    def set(self, weights: Mapping[str, Weight]) -> None:
        """Set weights."""
        if isinstance(weights, Mapping):
            weights = {name: _plain(weight) for name, weight in weights.items()}
        with self._others.change_adapters("set", weights):
            super().set(weights)

    def unload(self, name: str) -> None:
        """Take an adapter off."""
        with self._others.change_adapters("unload", name):
            super().unload(name)

    def unload_all(self) -> None:
        """Take all adapters off."""
        with self._others.change_adapters("unload_all"):
            super().unload_all()

    def enable(self, enabled: bool) -> None:
        """Let adapters count, or none of them."""
        with self._others.change_adapters("enable", enabled):
            super().enable(enabled)

    def fuse(self, scale: float, names: Sequence[str] | None = None) -> None:
        """Fix adapters."""
        with self._others.change_adapters("fuse", scale, names):
            super().fuse(scale, names)

    def unfuse(self) -> None:
        """End what `fuse` did."""
        with self._others.change_adapters("unfuse"):
            super().unfuse()

    def place(self, name: str, device: torch.device) -> None:
        """Keep an adapter with the model, or in host memory alone."""
        with self._others.change_adapters("place", name, device):
            super().place(name, device)


def _portable(source: Any) -> Any:
    """Return an adapter's source for a process with another device and another current folder."""
    if isinstance(source, (str, os.PathLike)):
        return Path(source).absolute()
    if not isinstance(source, Mapping):
        return source
    # A tensor without data is sent as it is, for its error.
    return {
        # Cloned, because a view would be sent with all of the memory that it shows a part of.
        key: value.detach().cpu().clone()
        if isinstance(value, torch.Tensor) and not value.is_meta
        else value
        for key, value in source.items()
    }


def _plain(given: Any) -> Any:
    """Return a mapping as a dict, which other processes can be sent."""
    return dict(given) if isinstance(given, Mapping) else given
