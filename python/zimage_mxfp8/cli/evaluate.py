"""`zimage-mxfp8 evaluate`."""

from __future__ import annotations

import argparse

from ..analysis.evaluate.thresholds import DEFAULT_MAX_WEIGHT_ERROR
from ..transformer.compute import COMPUTE_MODES, check_device
from .arguments import add_json, add_overwrite, count, local_path, number, number_or_none
from .download import add_download, resolve
from .models import add_device_and_dtype, add_model_dir, keep_libraries_quiet
from .streams import report_line


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser], line: str) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "evaluate",
        help=line,
        description="Make images with transformer A and with transformer B at the same prompts and "
        "seeds, measure how far A's are from B's (PSNR, SSIM, FLIP, latents after each step, "
        "weights), and write a page with all pairs. Exit code 1 if a threshold is not reached.",
    )
    parser.set_defaults(run=run)
    add_model_dir(parser)
    parser.add_argument(
        "--transformer",
        required=True,
        metavar="FILE",
        help="A, the file to judge: MXFP8, INT8 ConvRot or plain, or "
        "OWNER/NAME[@REVISION][/FILE.safetensors]",
    )
    parser.add_argument(
        "--against",
        metavar="FILE",
        help="B, the file to compare with (default: the folder's own transformer)",
    )
    add_download(parser)
    parser.add_argument(
        "--prompts",
        type=local_path,
        required=True,
        metavar="FILE",
        help="text file in UTF-8 with one prompt per line; lines that begin with # are skipped",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=local_path,
        metavar="FOLDER",
        help="folder for evaluate.html, evaluate.json and the images (default: only the tables)",
    )
    parser.add_argument(
        "--seeds",
        type=count(0),
        nargs="+",
        default=[0, 1],
        metavar="N",
        help="of the noise, for each prompt (default: 0 1)",
    )
    parser.add_argument(
        "--steps",
        type=count(1),
        default=8,
        metavar="N",
        help="forward passes of the transformer (default: 8, for Turbo)",
    )
    parser.add_argument(
        "--size",
        type=count(16),
        default=1024,
        metavar="PIXELS",
        help="side of the images, a multiple of 16 (default: 1024)",
    )
    parser.add_argument(
        "--guidance",
        type=number,
        default=0.0,
        metavar="SCALE",
        help="classifier-free guidance, ComfyUI's CFG minus 1 (default: 0, none, for Turbo)",
    )
    parser.add_argument(
        "--compute",
        choices=("auto", *COMPUTE_MODES),
        default="auto",
        help="how quantised layers of A are multiplied (default: chosen for the device)",
    )
    parser.add_argument(
        "--against-compute",
        choices=("auto", *COMPUTE_MODES),
        default="weight-only",
        help="the same for B (default: weight-only)",
    )
    parser.add_argument(
        "--min-psnr",
        type=number,
        metavar="DB",
        help="fail if the mean PSNR is lower",
    )
    parser.add_argument(
        "--min-ssim",
        type=number,
        metavar="0-1",
        help="fail if the mean SSIM is lower",
    )
    parser.add_argument(
        "--max-flip",
        type=number,
        metavar="0-1",
        help="fail if the mean FLIP is higher",
    )
    parser.add_argument(
        "--max-weight-error",
        type=number_or_none,
        default=DEFAULT_MAX_WEIGHT_ERROR,
        metavar="X",
        help="fail if the relative squared error of any weight matrix against B's is higher, or if "
        f"one has no counterpart; none: any error (default: {DEFAULT_MAX_WEIGHT_ERROR:g}, which "
        "files that this package makes of B stay below, and 4 bits do not)",
    )
    add_device_and_dtype(parser)
    add_overwrite(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    for compute in (arguments.compute, arguments.against_compute):
        check_device(compute, arguments.device)
    report_line("checking the model folder, the prompts and the output ...")
    from ..analysis.evaluate.folder import OWN_ENTRIES, save_report
    from ..analysis.evaluate.inputs import find_files, image_settings
    from ..analysis.evaluate.prompts import read_prompts
    from ..analysis.evaluate.thresholds import Thresholds
    from ..checkpoint import hub
    from ..checkpoint.output_folder import check_target_folder
    from ..printing.evaluate import print_evaluation
    from ..printing.progress import analysis_bar
    from ..system.optional_packages import needed
    from . import display

    # Wrong names are reported now, and not after seconds of importing and minutes of loading.
    Thresholds(
        arguments.min_psnr, arguments.min_ssim, arguments.max_flip, arguments.max_weight_error
    )
    prompts = read_prompts(arguments.prompts)
    if not arguments.download:
        keep_libraries_quiet()
    own = () if arguments.against else (hub.TRANSFORMER,)
    model_dir = resolve(arguments.model_dir, (*hub.COMPONENTS, *own), download=arguments.download)
    files = [
        None if name is None else resolve(name, (hub.TRANSFORMER,), download=arguments.download)
        for name in (arguments.transformer, arguments.against)
    ]
    assert files[0] is not None  # a required option
    find_files(
        model_dir, files[0], files[1], arguments.compute, arguments.against_compute, download=False
    )
    size = (arguments.size, arguments.size)
    image_settings(prompts, arguments.seeds, arguments.steps, size, arguments.guidance)
    if arguments.output is not None:
        check_target_folder(arguments.output, OWN_ENTRIES, overwrite=arguments.overwrite)
    keep_libraries_quiet()
    report_line("loading torch and diffusers ...")
    with needed("evaluate", "evaluate"):
        from ..analysis.evaluate.run import evaluate
    from ..analysis.pages.links import link_from_above, links_above
    from ..analysis.pages.page import Origin

    with analysis_bar(report_line) as progress:
        report = evaluate(
            model_dir,
            files[0],
            files[1],
            prompts=prompts,
            seeds=arguments.seeds,
            steps=arguments.steps,
            size=size,
            guidance=arguments.guidance,
            compute=arguments.compute,
            against_compute=arguments.against_compute,
            min_psnr=arguments.min_psnr,
            min_ssim=arguments.min_ssim,
            max_flip=arguments.max_flip,
            max_weight_error=arguments.max_weight_error,
            device=arguments.device,
            dtype=arguments.dtype,
            progress=progress,
        )
    display.warn(report.warnings)
    try:
        display.show(report, print_evaluation, as_json=arguments.json)
    finally:  # also if nobody reads standard output any more
        if arguments.output is not None:
            origin = Origin(arguments.command_line, links_above(arguments.output))
            save_report(report, arguments.output, origin, overwrite=arguments.overwrite)
            link_from_above(arguments.output)
    if arguments.output is not None:
        what = "evaluate.html, evaluate.json and the images"
        display.wrote(arguments.output, what, as_json=arguments.json)
    if report.failures:
        report_line(f"error: {', and '.join(report.failures)}")
        return 1
    return 0
