"""The report of a conversion."""

from __future__ import annotations

from ..conversion.report import ConversionReport
from ..streaming.formats import FORMATS
from .errors import print_errors
from .screen import Screen, size_text


def print_conversion(report: ConversionReport, screen: Screen) -> None:
    """Print a `ConversionReport`."""
    rows = [[f"quantised to {FORMATS[report.format].title}", str(report.quantized)]]
    rows += [[f"kept: {reason}", str(number)] for reason, number in report.kept.items()]
    if report.corrected_biases:
        rows.append([f"biases corrected ({report.bias_correction})", str(report.corrected_biases)])
    rows += [
        [f"layers changed by {lora['path']} at weight {lora['weight']:g}", str(lora["layers"])]
        for lora in report.loras
    ]
    screen.table(f"{report.output} (recipe {report.recipe})", ["what", "tensors>"], rows)
    speed = report.input_bytes / report.seconds / 1e9 if report.seconds else 0.0
    screen.text(
        f"{size_text(report.input_bytes)} -> {size_text(report.output_bytes)} "
        f"({report.ratio - 1:+.1%}) in {report.seconds:.1f} s, {speed:.2f} GB/s"
    )
    if report.errors is not None:
        print_errors(report.errors, screen)
