"""How ComfyUI adds a LoRA to MXFP8 weights, against what `benchmarks lora` simulates."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

import zimage_mxfp8 as zm
from benchmarks.suites import lora

pytestmark = pytest.mark.comfyui


def relative_errors(decoded: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """The error of each block of 32."""
    errors, blocks = ((x.unflatten(1, (-1, 32))) for x in (decoded - exact, exact))
    return errors.norm(dim=-1) / blocks.norm(dim=-1)


def test_the_simulation_rounds_as_comfyui_does(comfy: SimpleNamespace) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.exp2(torch.randint(-8, 3, (256, 1), generator=generator))
    matrix = torch.randn(256, 512, generator=generator) * sizes
    round_blocks = import_module("comfy.float").stochastic_round_quantize_mxfp8_by_block
    codes, scales = round_blocks(matrix, pad_32x=True, seed=1)
    theirs = zm.dequantize(zm.MXFP8Array(codes, scales.view(torch.uint8), matrix.shape)).float()
    ours = lora.encode_stochastically(matrix)
    assert not torch.equal(theirs, ours)  # by chance
    their_errors, our_errors = (relative_errors(each, matrix) for each in (theirs, ours))
    # Scales twice as large would double the mean, and rounding to nearest makes it smaller.
    assert our_errors.mean().item() == pytest.approx(their_errors.mean().item(), rel=0.02)
    nearest = zm.dequantize(zm.quantize(matrix)).float()
    assert relative_errors(nearest, matrix).mean() < 0.8 * their_errors.mean()
