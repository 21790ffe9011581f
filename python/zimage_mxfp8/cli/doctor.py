"""`zimage-mxfp8 doctor`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .arguments import add_json

if TYPE_CHECKING:
    from ..diagnosis import Paths


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "doctor",
        help="show versions, devices and the paths that they take",
        description="Show what this installation is, the devices that it finds, which path each "
        "takes for products, and why not others.",
    )
    parser.set_defaults(run=run)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from ..diagnosis import diagnose
    from . import display

    found = diagnose()
    if arguments.json:
        display.print_json(found.to_dict())
        return 0
    kernels = "none in this build (ZM_CUDA=ON builds them)"
    if found.cuda:
        kernels = f"{', '.join(found.architectures)} (compiled by CUDA {found.cuda})"
    rows = [
        ["zimage-mxfp8", found.version],
        ["Python", found.python],
        ["CPU kernels", f"{found.cpu_target}, of {', '.join(found.cpu_targets)}"],
        ["cores", str(found.threads)],
        ["CUDA kernels", kernels],
        ["CUTLASS", found.cutlass or "not used"],
        ["cuBLASLt", found.cublaslt or "not found"],
        *([name, number] for name, number in found.libraries.items()),
    ]
    display.print_table("Installation", ["what", "version"], rows)
    _print_paths("CPU", found.cpu)
    if not found.devices:
        display.console().print("No CUDA device was found: everything runs on the CPU.")
    for device in found.devices:
        memory = display.size_text(device.memory)
        title = f"{device.name}, compute capability {device.capability}, {memory}"
        _print_paths(title, device.paths)
    return 0


def _print_paths(title: str, paths: Paths) -> None:
    from . import display

    taken = {
        what: path or "only emulated, when asked for" for what, path in paths.preferred.items()
    }
    auto, *others = paths.compute
    taken["transformer's compute modes"] = ", ".join([f"{auto} (auto)", *others])
    display.print_table(title, ["product", "path"], [list(row) for row in taken.items()])
    reasons = [list(row) for row in paths.reasons.items()]
    display.print_table(None, ["not taken", "because"], reasons)
