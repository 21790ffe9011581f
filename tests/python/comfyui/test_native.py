"""Calls of the speed-up on a module in the place of ComfyUI's."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import nn

import zimage_mxfp8 as zm
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


class Transformer:
    """What the speed-up makes of a module: multiplies by a number."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, factor: float) -> None:
        self.factor, self.calls = factor, 0
        self.failure: Exception | None = None

    def __call__(self, images: list[torch.Tensor], *_: Any, **options: Any) -> Any:
        self.calls += 1
        if self.failure is not None:
            raise self.failure
        return ([-self.factor * image for image in images],)


@pytest.fixture
def forward(monkeypatch: pytest.MonkeyPatch) -> NativeForward:
    """One whose transformers multiply by 1, 2, ..., and are made when no other is alive."""
    alive: list[weakref.ref[Transformer]] = []

    def make(*_: Any) -> Any:
        assert not any(each() for each in alive)
        made = Transformer(len(alive) + 1)
        alive.append(weakref.ref(made))
        return made

    monkeypatch.setattr(NativeForward, "_make", make)
    return NativeForward(Stock(), "auto", {})


GIVEN = torch.ones(1, 16, 2, 2), torch.ones(1), torch.ones(1, 1, 4), 1


def test_weights_that_change_between_calls(forward: NativeForward) -> None:
    for factor in (1, 2, 3):
        forward.module.first = nn.Linear(4, 4)
        for _ in range(2):
            assert torch.equal(forward(*GIVEN), factor * GIVEN[0])
    assert forward.native_calls == 6 and not forward.fallback_calls


@pytest.mark.parametrize(
    "failure", [torch.OutOfMemoryError("no memory"), zm.CudaError("no memory")]
)
def test_an_error_with_weights_that_are_replaced(
    forward: NativeForward, failure: Exception
) -> None:
    forward(*GIVEN)
    transformer: Any = forward._transformer
    transformer.failure = failure
    del transformer
    forward.module.first = nn.Linear(4, 4)
    assert torch.equal(forward(*GIVEN), 2 * GIVEN[0])


def test_an_error_is_told_once(forward: NativeForward) -> None:
    forward(*GIVEN)
    transformer: Any = forward._transformer
    transformer.failure = zm.CudaError("the device ran out of memory")
    assert torch.equal(forward(*GIVEN), GIVEN[0] + 1)
    assert transformer.calls == 2
    assert forward.fallback_calls == {"the device ran out of memory": 1}
