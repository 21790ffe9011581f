"""The report of `validate`."""

from __future__ import annotations

from ..conversion.validation import ValidationReport
from ..text import plural
from .errors import print_errors
from .screen import Screen

_MAX_SHOWN = 20


def print_validation(report: ValidationReport, screen: Screen) -> None:
    """Print a `ValidationReport`."""
    for breach in report.breaches[:_MAX_SHOWN]:
        screen.text(f"breach: {breach}")
    if len(report.breaches) > _MAX_SHOWN:
        more = len(report.breaches) - _MAX_SHOWN
        screen.text(f"... and {more} more breaches ({screen.complete} has all)")
    for note in report.notes:
        screen.text(f"note: {note}")
    if report.errors:
        print_errors(report.errors, screen)
    compared = "; codes, scales and their order equal the original's" if report.against else ""
    if report.loras:
        compared += f" with {plural(len(report.loras), 'adapter')} merged"
    if report.ok:
        screen.text(
            f"{report.file}: sound, {plural(report.layers, f'{report.format} layer')}{compared}"
        )
    else:
        count = plural(len(report.breaches), "breach", "breaches")
        screen.text(f"{report.file}: {count} of the contract")
