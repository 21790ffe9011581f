"""`sensitivity` on a CUDA device, against the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import zimage_mxfp8 as zm
from zimage_mxfp8.analysis.sensitivity.settings import MEASURED_MODES

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("compute", MEASURED_MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_errors_are_those_of_the_cpu(compute: str, dtype: torch.dtype, folder: Path) -> None:
    settings = {"size": (32, 32), "timesteps": 1, "dtype": dtype, "compute": compute}
    found = zm.analyse_sensitivity(folder, device="cuda", **settings)
    want = zm.analyse_sensitivity(folder, device="cpu", **settings)
    assert found.everything.error == pytest.approx(want.everything.error, rel=0.1)
    if dtype == torch.float32:  # the rounding of BF16 hides single layers
        errors = {layer.name: layer.error.total for layer in want.layers}
        assert {layer.name: layer.error.total for layer in found.layers} == pytest.approx(
            errors, rel=0.1
        )
