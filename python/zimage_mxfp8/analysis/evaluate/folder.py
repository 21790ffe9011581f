"""The output folder of an evaluation."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ...checkpoint.output_folder import write_folder
from ...checks import path
from ..pages.page import Origin

if TYPE_CHECKING:
    from .report import EvaluationReport

OWN_ENTRIES = ("evaluate.html", "evaluate.json", "images")


def save_report(
    report: EvaluationReport, folder: str | os.PathLike[str], origin: Origin, *, overwrite: bool
) -> None:
    """Write the page, the figures as JSON and the images.

    Args:
        report: the evaluation.
        folder: see `EvaluationReport.save`.
        origin: how the page came to be.
        overwrite: see `EvaluationReport.save`.

    Raises:
        OutputError: it cannot be written, or must not be replaced.
    """
    files = _files(report, origin)
    write_folder(path("folder", folder), files, OWN_ENTRIES, overwrite=overwrite)


def _files(report: EvaluationReport, origin: Origin) -> Iterator[tuple[str, bytes]]:
    from .page import evaluation_page  # which imports torch

    names = _image_names(report)
    yield "evaluate.html", evaluation_page(report, names, origin).encode()
    document = report.to_dict()
    for pair, entry, (a, b) in zip(report.pairs, document["pairs"], names, strict=True):
        entry["image"], entry["against"] = a, b
        yield a, pair.image
        yield b, pair.against
    yield "evaluate.json", json.dumps(document, indent=2, ensure_ascii=False).encode()


def _image_names(report: EvaluationReport) -> list[tuple[str, str]]:
    """Return the names of A's and B's image of each pair: the prompt's number, and the seed."""
    numbers: dict[str, int] = {}
    names = []
    for pair in report.pairs:
        number = numbers.setdefault(pair.prompt, len(numbers) + 1)
        stem = f"images/prompt-{number:03}-seed-{pair.seed}"
        names.append((f"{stem}-a.png", f"{stem}-b.png"))
    return names
