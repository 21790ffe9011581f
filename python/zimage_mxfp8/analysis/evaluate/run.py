"""Both transformers at work: the same prompts, seeds and sampler, one model in memory at a time."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image

from ...generation.generator import GenerationProgress, ZImageGenerator
from ...generation.images import png_bytes
from ...generation.memory import PeakMemory
from ...generation.settings import GenerationSettings
from ...printing.progress import analysis_bar, shown
from ...streaming.jobs import Progress, StageCallback, StageProgress
from ...system.devices import torch_device
from ...transformer.model_file import open_model
from .inputs import find_files, image_settings, naming
from .metrics import compare_images
from .report import EvaluationReport, ImagePair, TransformerRun
from .thresholds import DEFAULT_MAX_WEIGHT_ERROR, Thresholds
from .weights import WeightComparison, compare_weights

DEFAULT_SEEDS = (0, 1)


@dataclass(frozen=True)
class _Made:
    """An image, and the latents after each step: float32 [steps, 16, height / 8, width / 8]."""

    png: bytes
    latents: torch.Tensor
    step_seconds: float
    warnings: tuple[str, ...]


def evaluate(
    model_dir: str | os.PathLike[str],
    transformer: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    *,
    prompts: Sequence[str],
    seeds: Sequence[int] = DEFAULT_SEEDS,
    steps: int = 8,
    size: tuple[int, int] = (1024, 1024),
    guidance: float = 0.0,
    compute: str = "auto",
    against_compute: str = "weight-only",
    min_psnr: float | None = None,
    min_ssim: float | None = None,
    max_flip: float | None = None,
    max_weight_error: float | None = DEFAULT_MAX_WEIGHT_ERROR,
    device: str | torch.device | None = None,
    dtype: str | None = None,
    download: bool = False,
    progress: StageCallback | bool | None = None,
) -> EvaluationReport:
    """Compare the images of two transformers at the same prompts and seeds.

    The prompts are encoded once. Then transformer A makes all its images, and after it transformer
    B, so that only one of them is in memory. The latents of A, about 1 MiB per step and image at
    1024 x 1024, and the images stay in memory until the end. The weight matrices of both files are
    compared as well, a few rows at a time.

    Args:
        model_dir: as for `ZImageGenerator`.
        transformer: A, the file to judge; MXFP8 or plain.
        against: B, the file to compare with; by default the folder's own transformer.
        prompts: one or more.
        seeds: of each prompt; all different.
        steps: forward passes for an image.
        size: height and width of the images, multiples of 16 up to 8192.
        guidance: classifier-free guidance, 0 for Turbo.
        compute: compute mode of A.
        against_compute: compute mode of B.
        min_psnr: dB that the mean PSNR has to reach for the report to be `ok`.
        min_ssim: what the mean SSIM has to reach, 0 to 1.
        max_flip: what the mean FLIP may reach, 0 to 1.
        max_weight_error: relative squared error that every weight matrix may reach against B's. The
            report is not `ok` either if a matrix has no counterpart of its shape. None: any error.
        device: as for `ZImageGenerator`.
        dtype: see `ZImageGenerator`.
        download: as for `ZImageGenerator`.
        progress: called as stages begin, and after each step; True draws a bar on a terminal, and
            prints lines to stderr elsewhere.

    Raises:
        CheckpointError: a part is missing, damaged or does not go with the others.
        GenerationError: an image became NaN or infinite.
        UsageError: arguments that cannot be.
        UnsupportedError: the device does not have a mode, or the CPU has too little memory.
        CudaError: the device has too little memory.
    """
    thresholds = Thresholds(min_psnr, min_ssim, max_flip, max_weight_error)
    settings = image_settings(prompts, seeds, steps, size, guidance)
    folder, *paths = find_files(
        model_dir, transformer, against, compute, against_compute, download=download
    )
    generators = [ZImageGenerator(folder, paths[0], device, compute, dtype, offload=True)]
    with naming("compute", "against_compute"):
        generators.append(
            ZImageGenerator(folder, paths[1], device, against_compute, dtype, offload=True)
        )
    with shown(progress, analysis_bar) as callback:
        work = _Work(
            torch_device(device), generators[0].dtype, settings, callback or (lambda _: None)
        )
        captions = work.encode(generators[0])
        made_a, run_a = work.make_images("A", generators[0], paths[0], captions)
        made_b, run_b = work.make_images("B", generators[1], paths[1], captions)
        weights = work.compare_weights(paths)
        work.begin("comparing the images")
        pairs = tuple(map(_compare, settings, made_a, made_b))
        work.begin("done")
    first = settings[0]
    assert first.height and first.width  # given above
    return EvaluationReport(
        model_dir=str(model_dir),
        a=run_a,
        b=run_b,
        weights=weights,
        pairs=pairs,
        thresholds=thresholds,
        steps=first.steps,
        height=first.height,
        width=first.width,
        guidance=first.guidance,
        device=str(torch_device(device)),
        dtype=generators[0].dtype,
        warnings=tuple(dict.fromkeys(each for made in made_a for each in made.warnings)),
    )


class _Work:
    def __init__(
        self,
        device: torch.device,
        dtype: str,
        settings: Sequence[GenerationSettings],
        progress: StageCallback,
    ) -> None:
        self._device, self._dtype = device, dtype
        self._settings, self._progress = settings, progress
        self._stage, self._what, self._done = "", "", 0
        self._total = 2 * sum(each.steps for each in settings)

    def begin(self, stage: str) -> None:
        """Report a stage."""
        self._stage, self._what = stage, ""
        self._report()

    def _report(self) -> None:
        self._progress(StageProgress(self._stage, self._what, self._done, self._total))

    def encode(self, generator: ZImageGenerator) -> list[list[torch.Tensor]]:
        """Return the captions of all images; those of a prompt are shared by its seeds."""
        self.begin("encoding the prompts")
        found: dict[str, list[torch.Tensor]] = {}
        with generator.holding("text encoder"):
            for each in self._settings:
                if each.prompt not in found:
                    found[each.prompt] = generator.encode(each)
        return [found[each.prompt] for each in self._settings]

    def make_images(
        self,
        name: str,
        generator: ZImageGenerator,
        path: Path,
        captions: Sequence[list[torch.Tensor]],
    ) -> tuple[list[_Made], TransformerRun]:
        """Return all images of a transformer."""
        self.begin(f"loading transformer {name}")
        peak, made, compute = PeakMemory(self._device), [], ""
        with generator.holding("transformer", "VAE"):
            self.begin(f"making images with {name}")
            for i, (settings, features) in enumerate(zip(self._settings, captions, strict=True)):
                self._what = f"{name}: image {i + 1} of {len(self._settings)}"
                latents: list[torch.Tensor] = []
                generation = generator.generate(
                    settings,
                    self._count_steps,
                    captions=features,
                    on_step=partial(_keep, latents),
                )
                made.append(
                    _Made(
                        png_bytes(generation.images[0], generation.metadata(0)),
                        torch.stack(latents).cpu(),
                        generation.step_seconds,
                        generation.warnings,
                    )
                )
                compute = generation.compute
        run = TransformerRun(
            path=str(path),
            compute=compute,
            nbytes=open_model(path).nbytes(getattr(torch, self._dtype).itemsize),
            step_seconds=median(each.step_seconds for each in made),
            peak_nbytes=peak.nbytes(),
        )
        return made, run

    def compare_weights(self, paths: Sequence[Path]) -> WeightComparison:
        """Compare the weights of A and B."""
        self.begin("comparing the weights")

        def update(progress: Progress) -> None:
            self._what = f"weights: {100 * progress.done // max(progress.total, 1)} %"
            self._report()

        a, b = map(open_model, paths)
        return compare_weights(a, b, update)

    def _count_steps(self, progress: GenerationProgress) -> None:
        if progress.stage == "denoising":
            self._done += 1
            self._report()


def _keep(latents: list[torch.Tensor], _done: int, after: torch.Tensor) -> None:
    latents.append(after[0].clone())


def _compare(settings: GenerationSettings, a: _Made, b: _Made) -> ImagePair:
    assert settings.seed is not None
    metrics = compare_images(_opened(a.png), _opened(b.png))
    return ImagePair(
        prompt=settings.prompt,
        seed=settings.seed,
        psnr=metrics.psnr,
        ssim=metrics.ssim,
        flip=metrics.flip,
        latent_errors=tuple(_relative_errors(a.latents, b.latents)),
        image=a.png,
        against=b.png,
    )


def _opened(png: bytes) -> Any:
    return Image.open(io.BytesIO(png))


def _relative_errors(latents: torch.Tensor, reference: torch.Tensor) -> list[float]:
    """Norm of the difference over that of the reference, for each step."""
    difference = (latents.double() - reference.double()).flatten(1).norm(dim=1)
    errors: list[float] = (difference / reference.double().flatten(1).norm(dim=1)).tolist()
    return errors
