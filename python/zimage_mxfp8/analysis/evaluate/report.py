"""What an evaluation found."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from ... import _core
from .metrics import Summary, summarize
from .thresholds import Thresholds
from .weights import WeightComparison
from .wording import weight_failures


@dataclass(frozen=True)
class ImagePair:
    """Two images of the same prompt and seed.

    Attributes:
        prompt: of both.
        seed: of both.
        psnr: see `ImageMetrics`, of A against B.
        ssim: likewise.
        flip: likewise.
        latent_errors: after each step, the norm of the latents' difference over that of B's.
        image: PNG file of A's image, with its settings.
        against: PNG file of B's image.
    """

    prompt: str
    seed: int
    psnr: float
    ssim: float
    flip: float
    latent_errors: tuple[float, ...]
    image: bytes
    against: bytes


@dataclass(frozen=True)
class TransformerRun:
    """A transformer that made its images.

    Attributes:
        path: its file or folder.
        compute: the compute mode.
        nbytes: bytes of the weights in memory.
        step_seconds: time of a step, the median over all images.
        peak_nbytes: the most memory in use while the images were made: on CUDA devices what torch
            allocated there, else of the whole process; None where the system does not tell.
    """

    path: str
    compute: str
    nbytes: int
    step_seconds: float
    peak_nbytes: int | None


@dataclass(frozen=True, repr=False)
class EvaluationReport:
    """The images of transformer A, compared with those of transformer B at the same seeds.

    Attributes:
        model_dir: the folder with the other parts.
        a: the transformer that is evaluated.
        b: the one that it is compared with.
        weights: how far A's weight matrices are from B's.
        pairs: by prompt, then by seed.
        thresholds: what the mean of each metric of the images, and every weight, has to reach.
        steps: forward passes for an image.
        height: of the images, pixels.
        width: likewise.
        guidance: classifier-free guidance.
        device: where both ran.
        dtype: of everything that is not 8 bits wide.
        warnings: sentences for the user.
    """

    model_dir: str
    a: TransformerRun
    b: TransformerRun
    weights: WeightComparison
    pairs: tuple[ImagePair, ...]
    thresholds: Thresholds
    steps: int
    height: int
    width: int
    guidance: float
    device: str
    dtype: str
    warnings: tuple[str, ...]

    @cached_property
    def psnr(self) -> Summary:
        """The PSNR of all pairs; the mean leaves out equal images unless all are equal."""
        return summarize(
            [pair.psnr for pair in self.pairs], high_is_good=True, limits=(0, math.inf)
        )

    @cached_property
    def ssim(self) -> Summary:
        """The SSIM of all pairs."""
        return summarize([pair.ssim for pair in self.pairs], high_is_good=True, limits=(-1, 1))

    @cached_property
    def flip(self) -> Summary:
        """The FLIP of all pairs."""
        return summarize([pair.flip for pair in self.pairs], high_is_good=False, limits=(0, 1))

    @cached_property
    def latent_errors(self) -> tuple[Summary, ...]:
        """The relative error of the latents after each step, over all pairs."""
        by_step = zip(*(pair.latent_errors for pair in self.pairs), strict=True)
        return tuple(
            summarize(errors, high_is_good=False, limits=(0, math.inf)) for errors in by_step
        )

    @property
    def equal_pairs(self) -> int:
        """How many pairs have equal images."""
        return sum(math.isinf(pair.psnr) for pair in self.pairs)

    @property
    def failures(self) -> tuple[str, ...]:
        """Clauses about the thresholds that are not reached."""
        limits, found = self.thresholds, []
        if limits.min_psnr is not None and self.psnr.mean < limits.min_psnr:
            found.append(f"the mean PSNR is {self.psnr.mean:.2f} dB, below {limits.min_psnr:g} dB")
        if limits.min_ssim is not None and self.ssim.mean < limits.min_ssim:
            found.append(f"the mean SSIM is {self.ssim.mean:.4f}, below {limits.min_ssim:g}")
        if limits.max_flip is not None and self.flip.mean > limits.max_flip:
            found.append(f"the mean FLIP is {self.flip.mean:.4f}, above {limits.max_flip:g}")
        if limits.max_weight_error is not None:
            found += weight_failures(self.weights, limits.max_weight_error)
        return tuple(found)

    @property
    def ok(self) -> bool:
        """Whether all thresholds are reached."""
        return not self.failures

    @property
    def worst_first(self) -> Sequence[ImagePair]:
        """The pairs, the lowest PSNR first."""
        return sorted(self.pairs, key=lambda pair: pair.psnr)

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write evaluate.html, evaluate.json and images to a folder, which appears whole or not.

        Args:
            folder: a new or empty folder.
            overwrite: replace a folder that an earlier evaluation wrote.

        Raises:
            OutputError: it cannot be written, or must not be replaced.
        """
        from ..pages.page import FROM_PROGRAM
        from .folder import save_report

        save_report(self, folder, FROM_PROGRAM, overwrite=overwrite)

    def __repr__(self) -> str:
        psnr = f"PSNR {self.psnr.mean:.2f} dB"
        return f"EvaluationReport({self.a.path!r}, {len(self.pairs)} pairs, {psnr})"

    def __str__(self) -> str:
        from ...printing.evaluate import print_evaluation
        from ...printing.screen import as_text

        return as_text(lambda screen: print_evaluation(self, screen))

    def to_dict(self) -> dict[str, Any]:
        """As JSON-compatible values, without the images; None stands for an infinite PSNR."""
        pairs = [
            {
                "prompt": pair.prompt,
                "seed": pair.seed,
                "psnr": pair.psnr if math.isfinite(pair.psnr) else None,
                "ssim": pair.ssim,
                "flip": pair.flip,
                "latent_errors": list(pair.latent_errors),
            }
            for pair in self.pairs
        ]
        metrics = {
            name: {
                key: value if value is None or math.isfinite(value) else None
                for key, value in asdict(summary).items()
            }
            for name, summary in (("psnr", self.psnr), ("ssim", self.ssim), ("flip", self.flip))
        }
        return {
            "version": _core.__version__,
            "ok": self.ok,
            "failures": list(self.failures),
            "thresholds": asdict(self.thresholds),
            "model_dir": self.model_dir,
            "a": asdict(self.a),
            "b": asdict(self.b),
            "steps": self.steps,
            "height": self.height,
            "width": self.width,
            "guidance": self.guidance,
            "device": self.device,
            "dtype": self.dtype,
            "warnings": list(self.warnings),
            "weights": self.weights.to_dict(),
            "equal_pairs": self.equal_pairs,
            "metrics": metrics,
            "latent_errors": [asdict(summary) for summary in self.latent_errors],
            "pairs": pairs,
        }
