"""The report of `validate`."""

from __future__ import annotations

from ..conversion.validation.report import ValidationReport
from ..text import plural
from .errors import print_errors
from .screen import Screen, first_few


def print_validation(report: ValidationReport, screen: Screen) -> None:
    """Print a `ValidationReport`."""
    breaches = [f"breach: {breach}" for breach in report.breaches]
    notes = [f"note: {note}" for note in report.notes]
    for sentences, what in ((notes, "notes"), (breaches, "breaches")):  # notes may be the cause
        for sentence in first_few(sentences, what, screen.complete):
            screen.text(sentence)
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
