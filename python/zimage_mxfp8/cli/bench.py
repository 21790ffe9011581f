"""`zimage-mxfp8 bench`."""

from __future__ import annotations

import argparse

from ..system.optional_packages import needed
from .arguments import add_json, add_overwrite, file_path
from .models import add_device, keep_libraries_quiet
from .streams import report_line


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser], line: str) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "bench",
        help=line,
        description="Measure one forward of the transformer in every compute mode and in "
        "diffusers, and on a GPU each GEMM kernel next to torch's. Weights are random; no file is "
        "needed. About two minutes, longer on slow GPUs. On the CPU a small model is measured.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "-o", "--output", type=file_path, metavar="FILE.json", help="write the result as JSON"
    )
    add_device(parser)
    add_overwrite(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    import json

    from ..checkpoint.output import check_target, write_file
    from ..printing.bench import print_bench
    from ..printing.progress import analysis_bar
    from . import display

    if arguments.output is not None:
        check_target(arguments.output, (), overwrite=arguments.overwrite)
    keep_libraries_quiet()
    with needed("torch", "bench"):
        from ..bench.run import bench
    with analysis_bar(report_line) as progress:
        report = bench(arguments.device, progress=progress)
    try:
        display.show(report, print_bench, as_json=arguments.json)
    finally:  # also if nobody reads standard output any more
        if arguments.output is not None:
            content = json.dumps(report.to_dict(), indent=2).encode() + b"\n"
            write_file(arguments.output, content, overwrite=arguments.overwrite)
    if arguments.output is not None:
        display.wrote(arguments.output, "the result, for a report", as_json=arguments.json)
    return 0
