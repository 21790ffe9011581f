"""The option `--lora FILE[:WEIGHT]`."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path

from .arguments import local_path

_HELP = (
    "merge an adapter (LoRA, DoRA, LoHa, LoKr, differences) into the weights before they are "
    "rounded, at a weight (default: 1, may be negative); repeatable"
)


def add_lora(parser: argparse.ArgumentParser, *, required: bool = False, text: str = _HELP) -> None:
    """Add `--lora` to a parser."""
    parser.add_argument(
        "--lora",
        dest="loras",
        action="append",
        default=[],
        required=required,
        type=weighted_file,
        metavar="FILE[:WEIGHT]",
        help=text,
    )


def weighted_file(text: str) -> tuple[Path, float]:
    """Return a file and a weight, for `type=`.

    A colon counts only before a number, and only if there is no file of the whole name: it may
    stand in a name, and after the letter of a drive.
    """
    local_path(text)
    head, colon, tail = text.rpartition(":")
    try:
        whole = Path(text).exists()
    except OSError:  # too long
        whole = False
    if not colon or not head or whole:
        return Path(text), 1.0
    try:
        weight = float(tail)
    except ValueError:
        if Path(head).is_file():
            raise argparse.ArgumentTypeError(
                f'"{tail}" after the last colon of {text} is not a number; write FILE:0.8, or FILE '
                "alone for 1"
            ) from None
        return Path(text), 1.0
    if not math.isfinite(weight):
        raise argparse.ArgumentTypeError(f"the weight in {text} is not finite; write FILE:0.8")
    return Path(head), weight


def limit_blas(loras: Sequence[tuple[Path, float]]) -> None:
    """Give NumPy's BLAS one thread, before it is imported: layers are shared among threads."""
    if loras:
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
