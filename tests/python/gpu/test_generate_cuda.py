"""Images made on a CUDA device, against those of the CPU, which test_generate.py checks."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import zimage_mxfp8 as zm
from helpers.images import levels
from zimage_mxfp8.cli.generate import _peak_memory
from zimage_mxfp8.transformer.compute import COMPUTE_MODES, unsupported

pytestmark = pytest.mark.gpu

SETTINGS = zm.GenerationSettings("a cat", height=48, width=64, seed=7, batch=2)


@pytest.mark.parametrize("compute", COMPUTE_MODES)
def test_pictures_of_the_gpu(compute: str, zimage_folder: Path, zimage_quantized: Path) -> None:
    if why := unsupported(compute, torch.cuda.current_device()):
        pytest.skip(why)
    seen: list[zm.GenerationProgress] = []
    made = zm.ZImageGenerator(zimage_folder, zimage_quantized, "cuda", compute).generate(
        SETTINGS, seen.append
    )
    exact = zm.ZImageGenerator(zimage_folder, zimage_quantized, "cpu", "weight-only", "float32")
    for found, want in zip(made.images, exact.generate(SETTINGS).images, strict=True):
        difference = levels(found) - levels(want)
        assert np.sqrt(np.mean(difference**2)) < 0.3 * levels(want).std()
    steps = [progress for progress in seen if progress.stage == "denoising"]
    assert [progress.done for progress in steps] == list(range(1, 9))
    assert made.steps == 8 and made.step_seconds > 0


def test_offloading_frees_the_gpu(zimage_folder: Path, zimage_quantized: Path) -> None:
    generator = zm.ZImageGenerator(zimage_folder, zimage_quantized, "cuda", offload=True)
    left = []
    for _ in range(2):  # the first leaves the libraries' own workspaces behind
        generator.generate(SETTINGS)
        left.append(torch.cuda.memory_allocated())
    kept = zm.ZImageGenerator(zimage_folder, zimage_quantized, "cuda")
    assert left[1] <= left[0] < torch.cuda.memory_allocated()
    del kept


@pytest.mark.parametrize("offload", [False, True])
def test_previews_change_nothing_on_the_gpu(
    zimage_folder: Path, zimage_quantized: Path, offload: bool
) -> None:
    generator = zm.ZImageGenerator(zimage_folder, zimage_quantized, "cuda", offload=offload)
    shown: list[tuple[int, int]] = []
    made = [
        generator.generate(SETTINGS),
        generator.generate(
            SETTINGS,
            preview=lambda step, images: shown.append((step, len(images))),
            preview_every=3,
        ),
    ]
    assert shown == [(3, 2), (6, 2)]
    for first, second in zip(*(each.images for each in made), strict=True):
        assert (levels(first) == levels(second)).all()


def test_peak_memory_is_that_of_the_device(zimage_folder: Path, zimage_quantized: Path) -> None:
    generator = zm.ZImageGenerator(zimage_folder, zimage_quantized, "cuda")
    made = generator.generate(SETTINGS)
    assert made.device.startswith("cuda:")
    found = re.search(r"of (cuda:\d): (\S+) ([KMG])iB allocated", _peak_memory(made.device))
    assert found is not None and found[1] == made.device
    weights = sum(each.nbytes for each in generator._kept["VAE"].model.parameters())
    assert float(found[2]) * 1024 ** ("KMG".index(found[3]) + 1) > weights
