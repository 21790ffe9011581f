"""Images of the trained small model under each format, recipe, compute mode and number of steps.

Reads the folder that `python -m benchmarks.trained` writes (with the BF16 original). Every variant
draws the same captions from the same noise as the original does in float32. The training saw none
of these captions. PSNR is of the pixels, with a 95 % confidence interval of the mean (Student's t
over all images), SSIM and FLIP as in `zimage-mxfp8 evaluate`. `gain` is the mean difference of PSNR
to another row, image by image, with its interval: to MXFP8 for formats, to the same format without
a branch, to `uniform` for recipes, to no correction, to mode weight-only.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
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
from zimage_mxfp8.generation.components import VAE, TextEncoder
from zimage_mxfp8.generation.folder import open_model_folder
from zimage_mxfp8.generation.sampler import denoise
from zimage_mxfp8.transformer.compute import unsupported
from zimage_mxfp8.transformer.model import ZImageTransformer

from ..report import Report
from ..trained import scenes

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
_LAYERS = (
    *("attention.qkv", "attention.out"),
    *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
)
_MODULATION = "adaLN_modulation.0"
_RANK = 8  # of low-rank branches: 6 % of the width


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="folder that python -m benchmarks.trained wrote")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--captions", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=2, help="images of each caption")


@dataclass(frozen=True)
class Drawn:
    latents: torch.Tensor
    images: list[Image.Image]


class Painter:
    """Draws the same captions and noise with any transformer."""

    def __init__(self, folder: Path, device: str, captions: int, seeds: int) -> None:
        parts = open_model_folder(folder)
        self.device = torch.device(device)
        encoder = TextEncoder(parts, self.device, torch.float32)
        features = [encoder.encode(caption) for caption in scenes.unseen_captions(captions)]
        self.captions = [x for x in features for _ in range(seeds)]
        self._vae = VAE(parts, self.device, torch.float32)
        random = torch.Generator().manual_seed(0)
        shape = (len(self.captions), 16, 1, scenes.SIDE // 8, scenes.SIDE // 8)
        self._noise = torch.randn(shape, generator=random).to(self.device)

    @torch.no_grad()
    def draw(self, model: ZImageTransformer, steps: int = 8) -> Drawn:
        latents = []
        for first in range(0, len(self._noise), 32):
            noise = list(self._noise[first : first + 32])
            captions = [x.to(model.dtype) for x in self.captions[first : first + 32]]
            latents += denoise(model, noise, captions, steps)
        stacked = torch.stack(latents)
        images = []
        for latent in stacked[:, :, 0].split(1):
            pixels = self._vae.decode(latent)
            images += VaeImageProcessor(vae_scale_factor=16).postprocess(pixels)
        return Drawn(stacked, images)

    def load(
        self, file: Path, compute: str = "weight-only", dtype: torch.dtype = torch.float32
    ) -> ZImageTransformer:
        return ZImageTransformer.from_checkpoint(file, self.device, compute, dtype)


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
        endings = (*_LAYERS, _MODULATION) if modulations else _LAYERS
        return (
            name
            for name in self.tensors
            if name.removesuffix(".weight").endswith(endings) and name.endswith(".weight")
        )

    def replaced(
        self, change: Callable[[np.ndarray], np.ndarray], modulations: bool = False
    ) -> tuple[Path, float]:
        """Write a file with changed matrices; return it and their relative squared error."""
        changed, error, energy = dict(self.tensors), 0.0, 0.0
        for name in self.matrices(modulations):
            before = self.tensors[name].numpy()
            after = change(before)
            error += float(np.square(after - before, dtype=np.float64).sum())
            energy += float(np.square(before, dtype=np.float64).sum())
            changed[name] = torch.from_numpy(after)
        file = self._scratch / "replaced.safetensors"
        save_file(changed, file)
        return file, error / energy

    def error(self, change: Callable[[np.ndarray], np.ndarray]) -> float:
        """Return the relative squared error of changed matrices."""
        return _relative_error(
            [self.tensors[name].numpy() for name in self.matrices(False)], change
        )

    def noise_error(self, change: Callable[[np.ndarray], np.ndarray]) -> float:
        """Return the same of normal noise with the shapes of the matrices."""
        random = np.random.default_rng(0)
        shapes = [tuple(self.tensors[name].shape) for name in self.matrices(False)]
        noise = [random.standard_normal(shape, np.float32) for shape in shapes]
        return _relative_error(noise, change)


def _relative_error(
    matrices: list[np.ndarray], change: Callable[[np.ndarray], np.ndarray]
) -> float:
    error = sum(float(np.square(change(x) - x, dtype=np.float64).sum()) for x in matrices)
    return error / sum(float(np.square(x, dtype=np.float64).sum()) for x in matrices)


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


def run(arguments: argparse.Namespace, report: Report) -> None:
    device = arguments.device
    painter = Painter(arguments.model, device, arguments.captions, arguments.seeds)
    transformer = arguments.model / "transformer"
    originals: dict[int, Drawn] = {}
    drawn_levels: dict[tuple[str, str], list[float]] = {}  # PSNR of each image, by row

    def original(steps: int) -> Drawn:
        if steps not in originals:
            originals[steps] = painter.draw(painter.load(transformer), steps)
        return originals[steps]

    def add(
        table: str,
        variant: str,
        drawn: Drawn,
        against: Drawn,
        base: tuple[str, str] | None = None,
        **figures: float,
    ) -> None:
        change = (drawn.latents - against.latents).norm() / against.latents.norm()
        metrics = [compare_images(*pair) for pair in zip(drawn.images, against.images, strict=True)]
        levels = drawn_levels[table, variant] = [x.psnr for x in metrics]
        psnr: Summary = summarize(levels, high_is_good=True)
        if base is not None and base != (table, variant):
            pairs = zip(levels, drawn_levels[base], strict=True)
            gain = summarize([a - b for a, b in pairs], high_is_good=True)
            figures |= {"gain": gain.mean, "gain_low": gain.low, "gain_high": gain.high}
        report.add(
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

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        weights = Weights(transformer, folder)
        bf16 = painter.draw(painter.load(transformer, dtype=torch.bfloat16))
        add("arithmetic", "BF16, original weights", bf16, original(8), bits=16)
        for name in BASE_FORMATS:
            for modulations in (False, True):
                file, error = weights.replaced(decoded(name), modulations)
                title = FORMATS[name].title + (", modulations too" if modulations else "")
                bits = FORMATS[name].bits((128, 128)) / 128**2
                drawn = painter.draw(painter.load(file))
                base = ("formats", FORMATS["mxfp8-e4m3"].title)
                add("formats", title, drawn, original(8), base, bits=bits, weights=error)
        for name in ("mxfp8-e4m3", "int8-row", "nvfp4", "mxfp4"):
            for from_residual in (True, False):
                branch = with_branch(name, from_residual)
                file, error = weights.replaced(branch)
                plain = weights.error(decoded(name))
                way = "of the residual" if from_residual else "taken out first (SVDQuant)"
                add(
                    "branches",
                    f"{FORMATS[name].title}, {way}",
                    painter.draw(painter.load(file)),
                    original(8),
                    ("formats", FORMATS[name].title),
                    bits=FORMATS[name].bits((128, 128)) / 128**2 + 16 * _RANK * 2 / 128,
                    weights=error,
                    weights_gain=10 * math.log10(plain / error),
                    noise_gain=10
                    * math.log10(weights.noise_error(decoded(name)) / weights.noise_error(branch)),
                )

        sensitivity = analyse_sensitivity(  # in float32: BF16's own rounding hides single layers
            transformer,
            captions=painter.captions[: 4 * arguments.seeds : arguments.seeds],
            device=device,
            size=(scenes.SIDE, scenes.SIDE),
            timesteps=8,
            dtype=torch.float32,
        )
        probed = probe(transformer)
        rules = {rule.name: rule for rule in load_recipe("uniform").keep}
        small = (rules["embedders"], rules["final layer"])
        everything = Recipe("everything", "every linear of the blocks", "", small)
        uniform = load_recipe("uniform")
        recipes = {
            "uniform": uniform,
            "uniform, and all modulations kept": replace(
                uniform, keep=(*uniform.keep, modulations)
            ),
            "zimage": "zimage",
            "everything": everything,
            "of probe": probed.recipe,
            "of sensitivity": sensitivity_recipe(sensitivity),
        }
        for name, recipe in recipes.items():
            file = folder / "recipe.safetensors"
            zm.convert(transformer, file, recipe=recipe, overwrite=True)
            mib = file.stat().st_size / 2**20
            drawn = painter.draw(painter.load(file))
            add("recipes", name, drawn, original(8), ("recipes", "uniform"), mib=mib)
        file = folder / "uniform.safetensors"
        for mode in ("none", "synthetic", "timesteps"):
            zm.convert(transformer, file, bias_correction=mode, overwrite=True)
            add("bias", mode, painter.draw(painter.load(file)), original(8), ("bias", "none"))
        index = -1 if device == "cpu" else torch.device(device).index or 0
        for compute in ("weight-only", "fp8", "mxfp8-emulated", "mxfp8"):
            if reason := unsupported(compute, index):
                print(f"{compute} is left out: {reason}")
                continue
            for dtype in (torch.float32, torch.bfloat16):
                drawn = painter.draw(painter.load(file, compute, dtype))
                title = f"{compute}, {str(dtype).removeprefix('torch.')}"
                add("modes", title, drawn, original(8), ("modes", "weight-only, float32"))
        for steps in (4, 8, 20):
            for compute in ("weight-only", "fp8"):
                drawn = painter.draw(painter.load(file, compute), steps)
                add("steps", f"{steps} steps, {compute}", drawn, original(steps))
            add("steps", f"original, {steps} steps against 50", original(steps), original(50))

    for name, value in statistics(sensitivity, probed).items():
        report.add(table="statistics", variant=name, value=value)


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
