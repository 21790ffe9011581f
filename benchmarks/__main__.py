"""Run one suite of benchmarks, or bring the documentation's tables up to date.

python -m benchmarks SUITE [--json FILE] ...   # SUITE --help lists the options of a suite
python -m benchmarks tables [--check]          # results/*.json to the documentation
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from . import tables
from .report import Report

SUITES = {
    "codec": "quantize and dequantize on a CUDA device",
    "gemm": "GEMMs with 8-bit operands on a CUDA device",
    "fused": "the fused kernels on a CUDA device",
    "fused-gemm": "FP8 GEMMs with fused epilogues on Hopper",
    "transformer": "the whole transformer and generate on a CUDA device",
    "eager-dispatch": "cost of a call in eager code, and of a registered operation",
    "convert": "conversion of a checkpoint: time and memory of whole processes",
    "trained": "images of the trained small model under each format, recipe and mode",
    "minilm": "error of number formats on the weights of all-MiniLM-L6-v2",
    "additions": "forwards with adapters and with a ControlNet on a CUDA device",
    "ranks": "forwards that several CUDA devices share",
    "comfyui": "forwards in ComfyUI, its own and with the node, on a CUDA device",
    "serving": "images per second and latency of serve with several replicas",
    "lora": "error of an adapter on MXFP8 weights: live, merged, added to the file",
    "bias-correction": "error of the modulation layers under each bias correction",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="suite", required=True, metavar="SUITE")
    chosen = sys.argv[1] if len(sys.argv) > 1 else ""
    for name, summary in SUITES.items():
        suite = commands.add_parser(
            name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        suite.add_argument("--json", type=Path, help="write the rows here, with the machine")
        if name == chosen:  # a suite imports the measured libraries
            module = importlib.import_module(f".suites.{name.replace('-', '_')}", __package__)
            suite.description = module.__doc__
            module.add_arguments(suite)
    generated = commands.add_parser("tables", help="write the tables of the documentation")
    generated.add_argument("--check", action="store_true", help="change nothing; fail if outdated")
    arguments = parser.parse_args()
    if arguments.suite == "tables":
        sys.exit(tables.update(check=arguments.check))
    module.run(arguments, Report(arguments.suite, module.COLUMNS, arguments.json))


if __name__ == "__main__":
    main()
