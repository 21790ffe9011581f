"""What `evaluate` found."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..analysis.evaluate.wording import formats_text, interval_text, number_text, psnr_text
from ..text import plural
from .screen import Screen, size_text

if TYPE_CHECKING:
    from ..analysis.evaluate.metrics import Summary
    from ..analysis.evaluate.report import EvaluationReport, TransformerRun

_SHOWN = 10  # pairs
_MAX_PROMPT = 60  # characters


def print_evaluation(report: EvaluationReport, screen: Screen) -> None:
    """Print the metrics, both transformers, the latents and the worst pairs."""
    _print_transformers(report, screen)
    _print_metrics(report, screen)
    screen.text(_weights(report))
    screen.table(
        "Latents of A after each step: norm of the difference over that of B's latents",
        ["step>", "mean>", "largest>"],
        [
            [str(step), f"{summary.mean:.4f}", f"{summary.worst:.4f}"]
            for step, summary in enumerate(report.latent_errors, 1)
        ],
    )
    worst = report.worst_first[:_SHOWN]
    title = "Pairs" if len(worst) == len(report.pairs) else f"The {_SHOWN} pairs of lowest PSNR"
    screen.table(
        title,
        ["prompt", "seed>", "PSNR>", "SSIM>", "FLIP>"],
        [
            [
                _shortened(pair.prompt),
                str(pair.seed),
                psnr_text(pair.psnr),
                f"{pair.ssim:.4f}",
                f"{pair.flip:.4f}",
            ]
            for pair in worst
        ],
    )
    screen.line()
    screen.text(_verdict(report))


def _print_transformers(report: EvaluationReport, screen: Screen) -> None:
    def row(name: str, run: TransformerRun) -> list[str]:
        peak = "-" if run.peak_nbytes is None else size_text(run.peak_nbytes)
        step = f"{run.step_seconds:.3f} s"
        return [name, run.path, run.compute, size_text(run.nbytes), step, peak]

    screen.table(
        f"{report.height}x{report.width} pixels, {plural(report.steps, 'step')}, "
        f"{report.dtype} on {report.device}",
        ["", "transformer", "compute", "weights>", "step>", "peak memory>"],
        [row("A", report.a), row("B", report.b)],
        spare=1,
    )


def _print_metrics(report: EvaluationReport, screen: Screen) -> None:
    limits = report.thresholds

    def row(name: str, summary: Summary, limit: float | None, decimals: int) -> list[str]:
        mean, worst = (number_text(value, decimals) for value in (summary.mean, summary.worst))
        wanted = "-" if limit is None else f"{limit:g}"
        return [name, mean, interval_text(summary, decimals), worst, wanted]

    screen.table(
        f"A's images against B's, {plural(len(report.pairs), 'pair')}",
        ["metric", "mean>", "95 % interval of the mean>", "worst>", "threshold>"],
        [
            row("PSNR (dB), at least", report.psnr, limits.min_psnr, 2),
            row("SSIM, at least", report.ssim, limits.min_ssim, 4),
            row("FLIP, at most", report.flip, limits.max_flip, 4),
        ],
    )
    if 0 < report.equal_pairs < len(report.pairs):
        screen.text(
            f"{plural(report.equal_pairs, 'pair')} of equal images, with an infinite PSNR: left "
            "out of its mean and interval."
        )


def _weights(report: EvaluationReport) -> str:
    weights = report.weights
    a, b = map(formats_text, weights.formats)
    difference = f"a relative squared error of {weights.relative_squared_error:.2e}"
    if weights.are_equal:
        difference = "no difference"
    elif (worst := weights.worst) is not None:
        difference += f", {worst.relative_squared_error:.2e} in the worst, {worst.name}"
    limit = report.thresholds.max_weight_error
    allowed = "" if limit is None else f" (threshold of each: {limit:g})"
    return f"Weight matrices of A ({a}) against B's ({b}): {difference}{allowed}."


def _verdict(report: EvaluationReport) -> str:
    if report.failures:
        return f"Failed: {', and '.join(report.failures)}."
    if report.equal_pairs == len(report.pairs):
        return "All pairs are equal."
    if not report.thresholds.are_given:
        return "No threshold was given."
    return "Passed: all thresholds are reached."


def _shortened(prompt: str) -> str:
    return prompt if len(prompt) <= _MAX_PROMPT else f"{prompt[: _MAX_PROMPT - 3]}..."
