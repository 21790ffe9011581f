"""The page of an evaluation."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...checkpoint.file_names import base_name
from ...printing.screen import size_text
from ..pages.blocks import Cell, Column, Paragraph, Table, Terms
from ..pages.markup import element, text
from ..pages.page import FROM_PROGRAM, Fact, Origin, Page, Section, Tile, render_page
from .metrics import Summary
from .report import EvaluationReport, ImagePair, TransformerRun
from .wording import interval_text, number_text, psnr_text

_FOLDER = Path(__file__).parent
_MAX_EMBEDDED = 600_000  # bytes of images in the page, which stays below 1 MB in Base64
_SMALL = 256  # pixels up to which images are enlarged without smoothing


def evaluation_page(
    report: EvaluationReport,
    names: Sequence[tuple[str, str]],
    origin: Origin = FROM_PROGRAM,
) -> str:
    """Return a page with all pairs of images, as HTML.

    Args:
        report: the evaluation.
        names: addresses of A's and B's image of each pair, relative to the page.
        origin: how the page came to be.
    """
    styles, scripts = ((_FOLDER / f"pairs.{kind}").read_text("utf-8") for kind in ("css", "js"))
    return render_page(
        Page(
            report="evaluate",
            title=f"Images of {base_name(report.a.path)}",
            question=f"How far are the images of A, {base_name(report.a.path)}, from those of B, "
            f"{report.b.path}, at the same prompts and seeds?",
            facts=_facts(report),
            tiles=_tiles(report),
            sections=[
                Section("Pairs of images", [_pairs(report, names)]),
                Section("Metrics", [_metrics(report), Terms(_TERMS)]),
                Section("Latents", [Paragraph(_LATENTS), _latents(report)]),
                Section("Transformers", [_transformers(report)]),
                Section("Figures of all pairs", [_figures(report)]),
            ],
            origin=origin,
        ),
        styles=styles,
        scripts=scripts,
    )


_LATENTS = (
    "Norm of the difference between the latents of A and B over the norm of B's, after each step, "
    "over all pairs."
)
_TERMS = {
    "PSNR": "Peak signal-to-noise ratio of all values of red, green and blue in dB; infinite for "
    "equal images, which the mean leaves out unless all are equal.",
    "SSIM": "Structural similarity in Gaussian windows of 11 x 11 pixels, 1 for equal images.",
    "FLIP": "NVIDIA's model of the difference that people see when they flip between two images, "
    "0 for equal images and at most 1; for a screen with 67 pixels per degree.",
    "95 % interval": "Where the mean of more pairs is to be expected (Student's t). Seeds of one "
    "prompt count as independent.",
}


@dataclass(frozen=True)
class _Pair:
    """A pair as the page shows it: addresses or data of both images."""

    pair: ImagePair
    images: tuple[str, str]

    def html(self) -> str:
        pair = self.pair
        figures = f"seed {pair.seed} · {_figures_of(pair)}"
        caption = element("span", text(pair.prompt), class_="prompt", title=pair.prompt)
        a, b = (
            element("img", alt=f"{name}: {pair.prompt}", src=source, class_=name.lower())
            for name, source in zip("AB", self.images, strict=True)
        )
        slider = element(
            "input", type="range", min="0", max="100", value="50", aria_label="A to the left, B"
        )
        stage = element("div", b + a + slider, class_="stage")
        return element("figure", stage + element("figcaption", caption + element("span", figures)))


@dataclass(frozen=True)
class _Pairs:
    """All pairs, with buttons for the ways to compare them. Without scripts: side by side."""

    pairs: Sequence[_Pair]
    is_small: bool

    def html(self) -> str:
        """Return the block as HTML."""
        buttons = "".join(
            element("button", label, type="button", data_mode=mode, aria_pressed=pressed)
            for mode, label, pressed in _MODES
        )
        tools = element("div", buttons, class_="tools", role="group", aria_label="View")
        figures = element("div", "\n".join(pair.html() for pair in self.pairs), class_="figures")
        kind = "pairs small" if self.is_small else "pairs"
        return element("div", tools + figures, class_=kind, data_mode="side")


_MODES = (
    ("side", "Side by side", "true"),
    ("slider", "Slider", "false"),
    ("flicker", "Flicker", "false"),
    ("difference", "Difference x 8", "false"),
)


def _pairs(report: EvaluationReport, names: Sequence[tuple[str, str]]) -> _Pairs:
    """Return the pairs, the lowest PSNR first; images inside the page as long as there is room."""
    order = sorted(range(len(report.pairs)), key=lambda i: report.pairs[i].psnr)
    room, shown = _MAX_EMBEDDED, []
    for i in order:
        pair = report.pairs[i]
        room -= len(pair.image) + len(pair.against)
        embedded = _embedded(pair.image), _embedded(pair.against)
        shown.append(_Pair(pair, embedded if room >= 0 else names[i]))
    return _Pairs(shown, max(report.height, report.width) <= _SMALL)


def _embedded(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _figures_of(pair: ImagePair) -> str:
    return f"PSNR {psnr_text(pair.psnr)} · SSIM {pair.ssim:.4f} · FLIP {pair.flip:.4f}"


def _facts(report: EvaluationReport) -> list[Fact]:
    prompts = len({pair.prompt for pair in report.pairs})
    seeds = ", ".join(dict.fromkeys(str(pair.seed) for pair in report.pairs))
    facts = [
        Fact("A", f"{report.a.path}, compute {report.a.compute}"),
        Fact("B", f"{report.b.path}, compute {report.b.compute}"),
        Fact("model", report.model_dir),
        Fact("prompts", f"{prompts:,}"),
        Fact("seeds", seeds),
        Fact("size", f"{report.width} x {report.height}"),
        Fact("steps", str(report.steps)),
    ]
    if report.guidance:
        facts.append(Fact("guidance", f"{report.guidance:g}"))
    return [*facts, Fact("device", report.device), Fact("dtype", report.dtype)]


def _tiles(report: EvaluationReport) -> list[Tile]:
    limits, last = report.thresholds, report.latent_errors[-1]
    psnr, ssim, flip = report.psnr, report.ssim, report.flip
    return [
        _tile("Mean PSNR", psnr_text(psnr.mean), psnr, limits.min_psnr, psnr.mean, 1),
        _tile("Mean SSIM", f"{ssim.mean:.4f}", ssim, limits.min_ssim, ssim.mean, 4),
        _tile("Mean FLIP", f"{flip.mean:.4f}", flip, limits.max_flip, flip.mean, 4, -1),
        Tile(
            "Error of the last latents",
            f"{last.mean:.4f}",
            f"mean; largest {last.worst:.4f}",
        ),
        Tile(
            "Time of a step",
            f"{report.a.step_seconds:.3f} s",
            f"of A; B takes {report.b.step_seconds:.3f} s",
        ),
    ]


def _tile(
    label: str,
    value: str,
    summary: Summary,
    limit: float | None,
    mean: float,
    decimals: int,
    sign: int = 1,
) -> Tile:
    """Return the tile of a metric; `sign` is -1 where low values are good."""
    worst = number_text(summary.worst, decimals)
    if limit is None:
        return Tile(label, value, f"worst {worst}; no threshold")
    is_good = sign * mean >= sign * limit
    note = f"worst {worst}; threshold {limit:g}"
    return Tile(label, value, note, "good" if is_good else "bad")


def _number(value: float) -> Cell:
    return value if math.isfinite(value) else "equal"


def _metrics(report: EvaluationReport) -> Table:
    limits = report.thresholds
    metrics = (
        ("PSNR (dB)", report.psnr, limits.min_psnr, 2),
        ("SSIM", report.ssim, limits.min_ssim, 4),
        ("FLIP", report.flip, limits.max_flip, 4),
    )
    return Table(
        [
            Column("metric"),
            Column("mean", 4),
            Column("95 % interval of the mean"),
            Column("worst", 4),
            Column("threshold of the mean", 4),
        ],
        [
            [name, _number(s.mean), interval_text(s, decimals), _number(s.worst), limit]
            for name, s, limit, decimals in metrics
        ],
        name="metrics",
    )


def _latents(report: EvaluationReport) -> Table:
    return Table(
        [Column("step"), Column("mean", 5, dots=True), Column("largest", 5)],
        [
            [str(step), summary.mean, summary.worst]
            for step, summary in enumerate(report.latent_errors, 1)
        ],
        name="latents",
    )


def _transformers(report: EvaluationReport) -> Table:
    def row(name: str, run: TransformerRun) -> list[Cell]:
        peak = None if run.peak_nbytes is None else size_text(run.peak_nbytes)
        weights = size_text(run.nbytes)
        return [name, run.path, run.compute, weights, run.step_seconds, peak]

    of_what = report.device if report.device.startswith("cuda") else "the process"
    return Table(
        [
            Column("transformer"),
            Column("file"),
            Column("compute"),
            Column("weights in memory"),
            Column("seconds per step", 4),
            Column(f"peak memory of {of_what}"),
        ],
        [row("A", report.a), row("B", report.b)],
        name="transformers",
    )


def _figures(report: EvaluationReport) -> Table:
    rows: list[list[Cell]] = [
        [pair.prompt, str(pair.seed), _number(pair.psnr), pair.ssim, pair.flip]
        for pair in report.worst_first
    ]
    return Table(
        [
            Column("prompt"),
            Column("seed"),
            Column("PSNR (dB)", 2),
            Column("SSIM", 4),
            Column("FLIP", 4),
        ],
        rows,
        name="pairs",
    )
