"""The page of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from ...checkpoint.file_names import base_name
from ...printing.screen import size_text
from ..pages.blocks import Cell, Column, Paragraph, Table, Terms
from ..pages.page import FROM_PROGRAM, Block, Fact, Origin, Page, Section, Tile, render_page
from .metrics import Summary
from .network import weights_sections
from .pairs import SCRIPTS, STYLES, Pairs
from .report import EvaluationReport, TransformerRun
from .wording import (
    formats_text,
    interval_text,
    number_text,
    psnr_text,
    shortened,
    weight_failures,
)

MAX_BYTES = 1_000_000  # of the page
_MAX_ROWS = 300  # pairs in the table
_MAX_SEEDS = 10  # named in the header


def evaluation_page(
    report: EvaluationReport,
    names: Sequence[tuple[str, str]],
    origin: Origin = FROM_PROGRAM,
) -> str:
    """Return a page with the map of the network and the pairs of images, as HTML.

    It has at most 1 MB, for any number of pairs.

    Args:
        report: the evaluation.
        names: addresses of A's and B's image of each pair, relative to the page.
        origin: how the page came to be.
    """
    files = _page(report, Pairs(report, names), origin)
    room = MAX_BYTES - len(files.encode())
    return _page(report, Pairs(report, names, room), origin)


def _page(report: EvaluationReport, pairs: Pairs, origin: Origin) -> str:
    network, weights = weights_sections(report)
    return render_page(
        Page(
            report="evaluate",
            title=f"Images of {base_name(report.a.path)}",
            question=f"How far are the images of A, {base_name(report.a.path)}, from those of B, "
            f"{base_name(report.b.path)}, at the same prompts and seeds?",
            facts=_facts(report),
            tiles=_tiles(report),
            sections=[
                network,
                Section("Pairs of images", [pairs]),
                Section("Metrics", [_metrics(report), Terms(_TERMS)]),
                Section("Latents", [Paragraph(_LATENTS), _latents(report)]),
                Section("Transformers", [_transformers(report)]),
                Section("Figures of pairs", [*_what_is_left_out(report), _figures(report)]),
                *weights,
            ],
            origin=origin,
        ),
        styles=STYLES,
        scripts=SCRIPTS,
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
    "95 % interval": "Where the mean of more pairs is to be expected (Student's t), as far as the "
    "metric goes. Seeds of one prompt count as independent.",
}


def _facts(report: EvaluationReport) -> list[Fact]:
    prompts = len({pair.prompt for pair in report.pairs})
    different = list(dict.fromkeys(str(pair.seed) for pair in report.pairs))
    seeds = ", ".join(different[:_MAX_SEEDS])
    if len(different) > _MAX_SEEDS:
        seeds += f", ... ({len(different):,})"
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
        _weights_tile(report),
    ]


def _weights_tile(report: EvaluationReport) -> Tile:
    weights = report.weights
    a, b = map(formats_text, weights.formats)
    value, notes = "equal" if weights.are_equal else "not known", []
    verdict: Literal["none", "good", "bad"] = "none"
    if (worst := weights.worst) is not None and not weights.are_equal:
        value = _percent(worst.relative_squared_error or 0.0)  # what the threshold is for
        notes = [f"{worst.name}; of all {_percent(weights.relative_squared_error)}"]
    limit = report.thresholds.max_weight_error
    if limit is None:
        notes.append("no threshold")
    else:
        notes.append(f"threshold {100 * limit:g} %")
        verdict = "bad" if weight_failures(weights, limit) else "good"
    notes.append(f"A: {a}; B: {b}")
    return Tile("Squared error of the worst weights", value, "; ".join(notes), verdict)


def _percent(share: float) -> str:
    return f"{100 * share:.4f} %"


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


def _limit(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"


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
            Column("threshold of the mean"),
        ],
        [
            [name, _number(s.mean), interval_text(s, decimals), _number(s.worst), _limit(limit)]
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
        peak = "unknown" if run.peak_nbytes is None else size_text(run.peak_nbytes)
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


def _what_is_left_out(report: EvaluationReport) -> list[Block]:
    if len(report.pairs) <= _MAX_ROWS:
        return []
    words = f"The {_MAX_ROWS} pairs of lowest PSNR; evaluate.json has all {len(report.pairs):,}."
    return [Paragraph(words)]


def _figures(report: EvaluationReport) -> Table:
    rows: list[list[Cell]] = [
        [shortened(pair.prompt), str(pair.seed), _number(pair.psnr), pair.ssim, pair.flip]
        for pair in report.worst_first[:_MAX_ROWS]
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
