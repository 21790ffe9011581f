"""`zimage-mxfp8 doctor`."""

from __future__ import annotations

import argparse

from .arguments import add_json


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
        ["compute modes on the CPU", _modes(found.cpu_compute)],
        *([name, number] for name, number in found.libraries.items()),
    ]
    display.print_table("Installation", ["what", "version"], rows)
    if not found.devices:
        display.console().print("No CUDA device was found: everything runs on the CPU.")
    for device in found.devices:
        title = (
            f"{device.name}, compute capability {device.capability}, "
            f"{display.size_text(device.memory)}"
        )
        paths = [
            [what, path or "only emulated, when asked for"]
            for what, path in device.preferred.items()
        ]
        paths.append(["transformer's compute modes", _modes(device.compute)])
        display.print_table(title, ["product", "path"], paths)
        reasons = [[path, reason] for path, reason in device.reasons.items()]
        display.print_table(None, ["not taken", "because"], reasons)
    return 0


def _modes(modes: list[str]) -> str:
    return ", ".join([f"{modes[0]} (auto)", *modes[1:]])
