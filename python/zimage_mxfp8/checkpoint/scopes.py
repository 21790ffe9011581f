"""Scopes: the tensors of a file that belong to the model.

A file may have a model's tensors under a prefix, such as `model.diffusion_model.`, and other models
next to them. The names themselves are in `zimage/layers.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ..zimage.layers import ZIMAGE
from ..zimage.table import LayerTable

COMFYUI_PREFIXES = ("", "model.diffusion_model.", "model.model.", "net.", "model.")
NOT_TRANSFORMER = " (not the transformer)"  # behind the group of a tensor out of scope


@dataclass(frozen=True)
class Scope:
    """The tensors of a file that belong to the model.

    Attributes:
        prefix: the part before their names.
        zimage: whether only names of Z-Image's modules count, not all names with the prefix.
        table: the model's layers.
    """

    prefix: str
    zimage: bool
    table: LayerTable = ZIMAGE

    def __contains__(self, name: str) -> bool:
        if not name.startswith(self.prefix):
            return False
        return not self.zimage or self.inner(name).partition(".")[0] in self.table.modules

    def inner(self, name: str) -> str:
        """Return a tensor's name without the prefix."""
        return name[len(self.prefix) :]

    def inner_names(self, names: Iterable[str]) -> dict[str, str]:
        """Return inner name -> name of the model's tensors."""
        return {self.inner(name): name for name in names if name in self}


WHOLE_FILE = Scope("", zimage=False)


def find_scopes(names: Collection[str], table: LayerTable = ZIMAGE) -> list[Scope]:
    """Return every set of Z-Image names in a file, the one to use first.

    A prefix that ComfyUI strips comes before others, and others before copies of averaged weights
    ("ema"). Names may be in either layout.
    """
    anchor = table.anchor
    prefixes = {
        name.removesuffix(anchor)
        for name in names
        if name.endswith(anchor) and (name == anchor or name[-len(anchor) - 1] in "._")
    }
    tokens = table.tokens
    whole = [p for p in prefixes if not tokens or any(p + token in names for token in tokens)]

    def rank(prefix: str) -> tuple[bool, bool, int, str]:
        return "ema" in prefix.lower(), prefix not in COMFYUI_PREFIXES, len(prefix), prefix

    return [Scope(prefix, zimage=True, table=table) for prefix in sorted(whole, key=rank)]


def group_of(name: str, scope: Scope) -> str:
    """Return the group that a tensor is shown under in tables."""
    if name not in scope:
        return name.split(".", 1)[0] + NOT_TRANSFORMER
    return scope.table.group_of(scope.inner(name))
