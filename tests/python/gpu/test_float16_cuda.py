"""Models in float16 on a CUDA device, with and without kernels, against the CPU and diffusers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.cuda_model import RAGGED, on_device
from helpers.diffusers_reference import random_inputs, relative_error
from helpers.massive_model import MassiveModel
from zimage_mxfp8.transformer.compute import COMPUTE_MODES, unsupported

MODES = ("plain", *COMPUTE_MODES)
# Relative error. Codes of activations differ where a sum is near the middle of two.
TOLERANCE = {"plain": 3e-3, "weight-only": 3e-3, "int8": 0.03}  # of other modes 0.06


@pytest.fixture(
    params=[
        pytest.param("kernels", marks=pytest.mark.gpu),
        pytest.param("no kernels", marks=pytest.mark.gpu(kernels=False)),
    ],
    autouse=True,
)
def build(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def massive(tmp_path_factory: pytest.TempPathFactory) -> MassiveModel:
    return MassiveModel(tmp_path_factory.mktemp("massive"))


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_what_the_cpu_gives(mode: str, massive: MassiveModel) -> None:
    index = torch.cuda.current_device()
    if mode != "plain" and (why := unsupported(mode, index)):  # type: ignore[arg-type]
        pytest.skip(why)
    inputs = random_inputs(*RAGGED)
    model = massive.load(mode, torch.float16, "cuda")
    given = on_device(inputs)
    eager, captured, replayed = (model(*given).sample for _ in range(3))
    for samples in (captured, replayed):
        assert all(map(torch.equal, samples, eager))
    if mode in ("plain", "weight-only"):
        want = massive.reference(*inputs, return_dict=False)[0]
    else:
        on_cpu = "mxfp8-emulated" if mode == "mxfp8" else mode
        want = massive.load(on_cpu, torch.float32)(*inputs).sample
    assert relative_error(eager, want) < TOLERANCE.get(mode, 0.06)
