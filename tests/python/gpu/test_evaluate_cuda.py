"""Two transformers evaluated on a CUDA device."""

from __future__ import annotations

import math

import pytest
import torch

import zimage_mxfp8 as zm
from zimage_mxfp8.generation.small_model import FOLDER, TRANSFORMER, examples
from zimage_mxfp8.transformer.compute import unsupported

pytestmark = pytest.mark.gpu


def test_modes_of_one_file_are_evaluated() -> None:
    """The small model in fp8 against itself with decoded weights."""
    if why := unsupported("fp8", torch.cuda.current_device()):
        pytest.skip(why)
    _, shown = examples()
    prompts = [example.prompt for example in shown[:2]]
    report = zm.evaluate(
        FOLDER,
        TRANSFORMER,
        TRANSFORMER,
        prompts=prompts,
        seeds=[0],
        steps=2,
        size=(128, 128),
        compute="fp8",
        against_compute="weight-only",
        min_psnr=30,
        max_weight_error=0,
        device="cuda",
    )
    assert report.ok and report.device.startswith("cuda")
    assert [pair.prompt for pair in report.pairs] == prompts
    for pair in report.pairs:
        assert 30 < pair.psnr < math.inf  # FP8 activations change a little, and something
        assert len(pair.latent_errors) == 2 and 0 < pair.latent_errors[1] < 0.2
    assert report.weights.are_equal and report.weights.relative_squared_error == 0
    assert (report.a.compute, report.b.compute) == ("fp8", "weight-only")
    for run in (report.a, report.b):
        assert run.nbytes > 9_260_192  # parameters of a byte each, and scales
        assert run.peak_nbytes is not None and run.peak_nbytes >= run.nbytes
        assert run.step_seconds > 0
    assert f"on {report.device}" in str(report)
