"""Images of the trained small model under each format, recipe, compute mode and number of steps.

Reads the folder that `python -m benchmarks.trained` writes (with the BF16 original). Every variant
draws the same captions from the same noise as the original does in float32. The training saw none
of these captions. PSNR is of the pixels, with a 95 % confidence interval of the mean (Student's t
over all images), SSIM and FLIP as in `zimage-mxfp8 evaluate`. `gain` is the mean difference of PSNR
to another row, image by image, with its interval: to MXFP8 for formats, to the same format without
a branch, to recipe `uniform`, to no correction.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy import stats

import zimage_mxfp8 as zm
from zimage_mxfp8.analysis.compare.formats import BASE_FORMATS, FORMATS, residual
from zimage_mxfp8.analysis.evaluate.metrics import Summary, compare_images, summarize
from zimage_mxfp8.analysis.probe.run import ProbeReport, probe
from zimage_mxfp8.analysis.sensitivity.recipe import sensitivity_recipe
from zimage_mxfp8.analysis.sensitivity.run import SensitivityReport, analyse_sensitivity
from zimage_mxfp8.checkpoint.diffusers_layout import to_comfyui_layout
from zimage_mxfp8.checkpoint.scopes import WHOLE_FILE
from zimage_mxfp8.checkpoint.source import TensorReader, open_checkpoint
from zimage_mxfp8.conversion.recipes import Recipe, load_recipe
from zimage_mxfp8.generation.example_images import Painter
from zimage_mxfp8.transformer.arithmetic import int8
from zimage_mxfp8.transformer.compute import COMPUTE_MODES, unsupported
from zimage_mxfp8.transformer.model import ZImageTransformer

from ..layers import LINEARS, MODULATIONS
from ..report import Report
from ..trained import scenes

TABLES = ("formats", "branches", "recipes", "bias", "modes", "steps", "statistics")
COLUMNS = {
    "table": "",
    "variant": "",
    "bits": "per weight of the quantised layers",
    "mib": "of the file",
    "weights": "relative squared error of the quantised layers",
    "latents": "relative error",
    "psnr": "dB",
    "low": "of the interval",
    "high": "of the interval",
    "worst": "image",
    "gain": "dB over another row",
    "gain_low": "of the interval",
    "gain_high": "of the interval",
    "ssim": "",
    "flip": "",
    "weights_gain": "dB of the weights by the branch",
    "noise_gain": "dB by the branch on normal noise of the same shapes",
    "value": "of a statistic",
}
_RANK = 8  # of low-rank branches: 6 % of the width
_BOUND = 0.02  # of a recipe of sensitivity, whose default keeps nothing on this model
_NOISE_SEED = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="folder that python -m benchmarks.trained wrote")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--captions", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=2, help="images of each caption")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES)


@dataclass(frozen=True)
class Drawn:
    latents: torch.Tensor
    images: list[Image.Image]


class Weights:
    """The original's tensors in ComfyUI's layout, and files in which some are replaced."""

    def __init__(self, transformer: Path, scratch: Path) -> None:
        checkpoint = to_comfyui_layout(open_checkpoint(transformer), WHOLE_FILE)
        self._scratch = scratch
        with TensorReader() as reader:
            self.tensors = {
                name: torch.from_numpy(reader.read(tensor))
                .view(torch.bfloat16)
                .reshape(tensor.shape)
                .float()
                for name, tensor in checkpoint.tensors.items()
            }

    def matrices(self, modulations: bool) -> Iterator[str]:
        endings = (*LINEARS, *MODULATIONS) if modulations else LINEARS
        return (
            name
            for name in self.tensors
            if name.removesuffix(".weight").endswith(endings) and name.endswith(".weight")
        )

    def replaced(
        self, change: Callable[[np.ndarray], np.ndarray], modulations: bool = False
    ) -> tuple[Path, float]:
        """Write a file with changed matrices; return it and their relative squared error."""
        before = {name: self.tensors[name].numpy() for name in self.matrices(modulations)}
        after = {name: change(matrix) for name, matrix in before.items()}
        file = self._scratch / "replaced.safetensors"
        save_file(self.tensors | {name: torch.from_numpy(x) for name, x in after.items()}, file)
        return file, _relative_error(before.values(), after.values())

    def noise_error(self, change: Callable[[np.ndarray], np.ndarray]) -> float:
        """Return the relative squared error of normal noise in the shapes of the matrices."""
        random = np.random.default_rng(0)
        shapes = [tuple(self.tensors[name].shape) for name in self.matrices(False)]
        noise = [random.standard_normal(shape, np.float32) for shape in shapes]
        return _relative_error(noise, [change(matrix) for matrix in noise])


def _relative_error(before: Collection[np.ndarray], after: Collection[np.ndarray]) -> float:
    def energy(matrix: np.ndarray) -> float:
        return float(np.square(matrix, dtype=np.float64).sum())

    error = sum(energy(y - x) for x, y in zip(before, after, strict=True))
    return error / sum(map(energy, before))


def decoded(name: str) -> Callable[[np.ndarray], np.ndarray]:
    """A matrix as a format stores it."""

    def change(matrix: np.ndarray) -> np.ndarray:
        rest = np.empty_like(matrix)
        residual(matrix, name, float(np.abs(matrix).max()), rest)
        return matrix - rest

    return change


def with_branch(name: str, from_residual: bool) -> Callable[[np.ndarray], np.ndarray]:
    """A low-rank branch in float32 and a format: of what the format loses, or taken out before."""

    def change(matrix: np.ndarray) -> np.ndarray:
        quantised = decoded(name)
        part = matrix - quantised(matrix) if from_residual else matrix
        u, s, v = np.linalg.svd(part, full_matrices=False)
        branch = ((u[:, :_RANK] * s[:_RANK]) @ v[:_RANK]).astype(np.float32)
        return quantised(matrix) + branch if from_residual else quantised(matrix - branch) + branch

    return change


class Evidence:
    """Measures one table per method."""

    def __init__(self, arguments: argparse.Namespace, report: Report, folder: Path) -> None:
        self._device, self._seeds = arguments.device, arguments.seeds
        unseen = scenes.unseen_captions(arguments.captions)
        captions = [caption for caption in unseen for _ in range(self._seeds)]
        report.note(
            captions=[{"seed": seed, "caption": caption} for caption, seed in unseen.items()],
            images_of_each_caption=self._seeds,
            noise_seed=_NOISE_SEED,  # of all images at once, in this order
        )
        shape = (len(captions), 16, 1, scenes.SIDE // 8, scenes.SIDE // 8)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(_NOISE_SEED)).to(
            self._device
        )
        self._painter = Painter(arguments.model, captions, list(noise), self._device)
        self._transformer, self._report = arguments.model / "transformer", report
        self._file, self._measured = folder / "converted.safetensors", folder / "measured.json"
        self._weights = Weights(self._transformer, folder)
        self._originals: dict[int, Drawn] = {}
        self._levels: dict[tuple[str, str], list[float]] = {}  # PSNR of each image, by row

    def formats(self) -> None:
        for name in BASE_FORMATS:
            for modulations in (False, True):
                file, error = self._weights.replaced(decoded(name), modulations)
                self._add(
                    "formats",
                    FORMATS[name].title + (", modulations too" if modulations else ""),
                    self._draw(file),
                    base=FORMATS["mxfp8-e4m3"].title,
                    bits=_bits(name),
                    weights=error,
                )

    def branches(self) -> None:
        for name in ("mxfp8-e4m3", "int8-row", "nvfp4", "mxfp4"):
            title, plain = FORMATS[name].title, decoded(name)
            file, before = self._weights.replaced(plain)
            self._add("branches", title, self._draw(file), bits=_bits(name), weights=before)
            noise = self._weights.noise_error(plain)
            for from_residual in (True, False):
                branch = with_branch(name, from_residual)
                file, error = self._weights.replaced(branch)
                way = "of the residual" if from_residual else "taken out first (SVDQuant)"
                self._add(
                    "branches",
                    f"{title}, branch {way}",
                    self._draw(file),
                    base=title,
                    bits=_bits(name) + 16 * _RANK * 2 / 128,
                    weights=error,
                    weights_gain=10 * math.log10(before / error),
                    noise_gain=10 * math.log10(noise / self._weights.noise_error(branch)),
                )

    def recipes(self) -> None:
        uniform, zimage = load_recipe("uniform"), load_recipe("zimage")
        rules = {rule.name: rule for rule in uniform.keep}
        small = (rules["embedders"], rules["final layer"])
        recipes = {
            "uniform": uniform,
            "uniform, and all modulations kept": replace(
                uniform, keep=(*uniform.keep, *zimage.keep)
            ),
            "zimage": zimage,
            "everything": Recipe("everything", "every linear of the blocks", "", small),
            "of probe": self._probed.recipe,
            "of sensitivity": sensitivity_recipe(self._sensitivity),
            f"of sensitivity, bound {_BOUND}": sensitivity_recipe(self._analysed(bound=_BOUND)),
        }
        for name, recipe in recipes.items():
            zm.convert(self._transformer, self._file, recipe=recipe, overwrite=True)
            mib = self._file.stat().st_size / 2**20
            self._add("recipes", name, self._draw(self._file), base="uniform", mib=mib)

    def bias(self) -> None:
        for mode in ("none", "synthetic", "timesteps"):
            zm.convert(self._transformer, self._file, bias_correction=mode, overwrite=True)
            self._add("bias", mode, self._draw(self._file), base="none")

    def modes(self) -> None:
        zm.convert(self._transformer, self._file, overwrite=True)
        index = -1 if self._device == "cpu" else torch.device(self._device).index or 0
        for compute in COMPUTE_MODES:
            if reason := unsupported(compute, index):
                print(f"{compute} is left out: {reason}")
                continue
            for dtype in (torch.float32, torch.bfloat16):
                title = f"{compute}, {str(dtype).removeprefix('torch.')}"
                self._add("modes", title, self._draw(self._file, compute, dtype))
        for title, block in (("int8 in blocks of up to 128", 128), ("int8 without a rotation", 1)):
            with patch.object(int8, "MAX_BLOCK", block):
                self._add("modes", f"{title}, float32", self._draw(self._file, "int8"))
        bfloat16 = self._draw(self._transformer, dtype=torch.bfloat16)
        self._add("modes", "original weights, bfloat16", bfloat16)

    def steps(self) -> None:
        zm.convert(self._transformer, self._file, overwrite=True)
        for steps in (4, 8, 20):
            for compute in ("weight-only", "fp8"):
                drawn = self._draw(self._file, compute, steps=steps)
                self._add("steps", f"{steps} steps, {compute}", drawn, steps=steps)
            title = f"original, {steps} steps against 50"
            self._add("steps", title, self._original(steps), steps=50)

    def statistics(self) -> None:
        for name, value in statistics(self._sensitivity, self._probed).items():
            self._report.add(table="statistics", variant=name, value=value)

    @cached_property
    def _sensitivity(self) -> SensitivityReport:
        return self._analysed()

    def _analysed(self, **options: float) -> SensitivityReport:
        return analyse_sensitivity(
            self._transformer,
            captions=self._painter.captions[: 4 * self._seeds : self._seeds],
            device=self._device,
            size=(scenes.SIDE, scenes.SIDE),
            timesteps=8,
            dtype=torch.float32,  # the rounding of BF16 hides single layers
            state=self._measured,  # with another bound no layer is measured again
            **options,
        )

    @cached_property
    def _probed(self) -> ProbeReport:
        return probe(self._transformer)

    def _original(self, steps: int) -> Drawn:
        if steps not in self._originals:
            self._originals[steps] = self._draw(self._transformer, steps=steps)
        return self._originals[steps]

    def _draw(
        self,
        file: Path,
        compute: str = "weight-only",
        dtype: torch.dtype = torch.float32,
        steps: int = 8,
    ) -> Drawn:
        model = ZImageTransformer.from_checkpoint(file, self._device, compute, dtype)
        latents, images = self._painter.draw(model, steps)
        return Drawn(torch.stack(latents), images)

    def _add(
        self,
        table: str,
        variant: str,
        drawn: Drawn,
        *,
        base: str = "",
        steps: int = 8,
        **figures: float | None,
    ) -> None:
        """Report a variant, compared with the original in `steps` steps and with row `base`."""
        against = self._original(steps)
        change = (drawn.latents - against.latents).norm() / against.latents.norm()
        metrics = [compare_images(*pair) for pair in zip(drawn.images, against.images, strict=True)]
        levels = self._levels[table, variant] = [x.psnr for x in metrics]
        psnr: Summary = summarize(levels, high_is_good=True, limits=(0, math.inf))
        if base and base != variant:
            pairs = zip(levels, self._levels[table, base], strict=True)
            changes = [a - b for a, b in pairs]
            gain = summarize(changes, high_is_good=True, limits=(-math.inf, math.inf))
            figures |= {"gain": gain.mean, "gain_low": gain.low, "gain_high": gain.high}
        self._report.add(
            table=table,
            variant=variant,
            latents=float(change),
            psnr=psnr.mean,
            low=psnr.low,
            high=psnr.high,
            worst=psnr.worst,
            ssim=float(np.mean([x.ssim for x in metrics])),
            flip=float(np.mean([x.flip for x in metrics])),
            **figures,
        )


def _bits(name: str) -> float:
    return FORMATS[name].bits((128, 128)) / 128**2


def run(arguments: argparse.Namespace, report: Report) -> None:
    with tempfile.TemporaryDirectory() as folder:
        evidence = Evidence(arguments, report, Path(folder))
        for table in arguments.tables:
            getattr(evidence, table)()


def statistics(sensitivity: SensitivityReport, probed: ProbeReport) -> dict[str, float]:
    """Return the figures that claims of others are about."""
    errors = {layer.name: layer.error for layer in sensitivity.layers}
    scored = [x for x in probed.tensors if x.name.removesuffix(".weight") in errors]
    ranks = stats.spearmanr(
        [x.score for x in scored], [errors[x.name.removesuffix(".weight")].total for x in scored]
    )
    found = {
        "rank correlation of probe's score with the squared error": float(ranks.statistic),
        "its p value": float(ranks.pvalue),
    }
    for part in ("attention", "feed_forward"):
        chosen = [error for name, error in errors.items() if f".{part}." in name]
        found[f"{part}: squared error of low frequencies, sum of the layers"] = sum(
            x.low for x in chosen
        )
        found[f"{part}: squared error of high frequencies, sum of the layers"] = sum(
            x.high for x in chosen
        )
    by_step: dict[int, float] = {}
    for layer in sensitivity.layers:
        for step, error in layer.by_step:
            by_step[step] = by_step.get(step, 0.0) + error.total
    found |= {
        f"squared error at step {step + 1}, sum of the layers": error
        for step, error in sorted(by_step.items())
    }
    saliences = list(sensitivity.salience.values())
    for field in fields(saliences[0]):
        values = [getattr(each, field.name) for each in saliences]
        if all(isinstance(value, float) for value in values):
            found[f"{field.name}, mean of the layers"] = float(np.mean(values))
            found[f"{field.name}, largest"] = max(values)
    return found
