"""The peer convert_to_quant, and the model card's command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# The model card's exclusions, as a regular expression for --exclude-layers.
CARD_EXCLUSIONS = (
    r"layers\.29\.attention\.qkv|layers\.(22|23|24|25|26|27|28|29)\.adaLN_modulation\.0|"
    r"context_refiner\.(0|1)\.attention\.out|context_refiner\.1\.feed_forward\.w2|"
    r"noise_refiner\.1\.attention\.qkv|noise_refiner\.1\.attention\.out|"
    r"noise_refiner\.1\.feed_forward\.w2|noise_refiner\.(0|1)\.feed_forward\.w3"
)


def card_command(source: Path, output: Path, *extra: str) -> list[str]:
    """The model card's command line, without the program's name."""
    return [
        *("-i", str(source), "-o", str(output), "--mxfp8", "--zimage", "--comfy_quant"),
        *("--save-quant-metadata", "--simple", "--low-memory", "--calib-samples", "64"),
        *("--exclude-layers", CARD_EXCLUSIONS, *extra),
    ]


def run_convert_to_quant(arguments: list[str]) -> None:
    # It collects garbage after every tensor, which takes most of its time unless what was imported
    # is left out.
    code = "import gc; from convert_to_quant.convert_to_quant import main; gc.freeze(); main()"
    subprocess.run(
        [sys.executable, "-c", code, *arguments], check=True, capture_output=True, timeout=300
    )
