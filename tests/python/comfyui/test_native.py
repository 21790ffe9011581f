"""Calls of the speed-up on a module in the place of ComfyUI's."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zimage_mxfp8.comfy.native import NativeForward


class Stock(nn.Module):
    """Two layers, and a forward that stands for ComfyUI's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def _forward(self, x: torch.Tensor, *_: Any, **options: Any) -> torch.Tensor:
        return x + 1


def test_weights_on_another_device_are_comfyuis() -> None:
    """Layers are moved away and back between calls."""
    module = Stock()
    forward = NativeForward(module, "auto", {})
    given = torch.ones(1, 16, 2, 2), torch.ones(1), torch.ones(1, 1, 4), 1
    module.second.to("meta")
    for _ in range(2):
        assert torch.equal(forward(*given), given[0] + 1)
    assert forward.fallback_calls == {"a part of the weights is on meta (low VRAM)": 2}
    module.second.to_empty(device="cpu")
    forward(*given)
    _, (reason, _) = forward.fallback_calls.items()
    assert "has no attribute" in reason  # the weights are there, but not those of Z-Image
    assert forward.native_calls == 0
