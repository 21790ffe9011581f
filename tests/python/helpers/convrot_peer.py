"""The INT8 part of convert_to_quant, so that it gives the same bytes on every CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch

# Its INT8 code imports triton, and runs without it on the CPU.
_TRITON = ("triton", "triton.language", "triton.language.extra")
_ROWS = 256  # at a time, so that their sums stay in the cache
_RUN = (
    "import gc, sys; sys.path.insert(0, sys.argv.pop(1)); "
    "from helpers.convrot_peer import prepare; prepare(); "
    "from convert_to_quant.convert_to_quant import main; gc.freeze(); main()"
)


def product_in_order(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Multiply [..., K] by [K, N] of powers of two, and add from the first column on."""
    total = torch.zeros(*a.shape[:-1], b.shape[1])
    pairs = zip(a.flatten(0, -2).split(_ROWS), total.flatten(0, -2).split(_ROWS), strict=True)
    for part, sums in pairs:
        for column, row in zip(part.T.unbind(), b.unbind(), strict=True):
            sums.addcmul_(column[:, None], row)
    return total


def adds_in_order() -> bool:
    """Return whether torch's products do so here: on Intel's CPUs, not on AMD's (MKL 2024.2)."""
    a = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    b = torch.ones(256, 256)
    return torch.equal(torch.matmul(a, b), product_in_order(a, b))


class _Torch(ModuleType):
    matmul = staticmethod(product_in_order)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def prepare() -> None:
    """Let convert_to_quant run without triton, and rotate with sums in order."""
    sys.modules.update({name: MagicMock() for name in _TRITON})
    from convert_to_quant.utils import convrot

    if not adds_in_order():
        convrot.torch = _Torch("torch")


def run_convert_to_quant(arguments: list[str]) -> None:
    folder = str(Path(__file__).parents[1])
    subprocess.run(
        [sys.executable, "-c", _RUN, folder, *arguments],
        check=True,
        capture_output=True,
        timeout=300,
    )
