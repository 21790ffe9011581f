"""The output folder of an evaluation."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from ...checkpoint.output_folder import write_folder
from ...checks import path
from .page import evaluation_page
from .report import EvaluationReport

PAGE, DATA, IMAGES = "report.html", "report.json", "images"
OWN_ENTRIES = (PAGE, DATA, IMAGES)


def save_report(
    report: EvaluationReport, folder: str | os.PathLike[str], *, overwrite: bool
) -> None:
    """Write the page, the figures as JSON and the images, see `EvaluationReport.save`."""
    target: Path = path("folder", folder)
    write_folder(target, _files(report), OWN_ENTRIES, overwrite=overwrite)


def image_names(report: EvaluationReport, number: int) -> tuple[str, str]:
    """Return the names of A's and B's image of a pair within the folder.

    Args:
        report: that holds the pair.
        number: of the pair in the report, from 0.
    """
    seed = report.pairs[number].seed
    prompts = dict.fromkeys(pair.prompt for pair in report.pairs)
    prompt = list(prompts).index(report.pairs[number].prompt) + 1
    stem = f"{IMAGES}/prompt-{prompt:03}-seed-{seed}"
    return f"{stem}-a.png", f"{stem}-b.png"


def _files(report: EvaluationReport) -> Iterator[tuple[str, bytes]]:
    yield PAGE, evaluation_page(report).encode()
    document = report.to_dict()
    for i, (pair, entry) in enumerate(zip(report.pairs, document["pairs"], strict=True)):
        entry["image"], entry["against"] = names = image_names(report, i)
        yield names[0], pair.image
        yield names[1], pair.against
    yield DATA, json.dumps(document, indent=2, ensure_ascii=False).encode()
