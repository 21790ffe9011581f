"""`zimage-mxfp8 doctor`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..devices import HOW_TO_GET_KERNELS
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
    kernels = f"none: {found.no_cuda}"
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
        ["NVIDIA driver", f"for CUDA {found.driver}" if found.driver else "not found"],
        *([name, number] for name, number in found.libraries.items()),
    ]
    display.print_table("Installation", ["what", "version"], rows)
    _print_paths("CPU", found.cpu, {})
    if not found.devices:
        display.screen().text(f"No CUDA device: {found.no_devices}. Everything runs on the CPU.")
    for device in found.devices:
        memory = display.size_text(device.memory)
        title = f"{device.name}, compute capability {device.capability}, {memory}"
        other = ("without kernels", device.without_kernels)
        if not device.kernels:
            other = ("with kernels", device.with_kernels)
        _print_paths(title, device.paths, {f"compute modes {other[0]}": ", ".join(other[1])})
    if found.devices and not found.cuda:
        display.screen().text(f"To get CUDA kernels, {HOW_TO_GET_KERNELS}.")
    display.print_table(
        "Extras",
        ["extra", "missing", "what installs it"],
        [
            [
                extra.name,
                ", ".join(extra.missing) or "nothing",
                extra.command if extra.missing else "",
            ]
            for extra in found.extras
        ],
    )
    return 0


def _print_paths(title: str, paths: Paths, more: dict[str, str]) -> None:
    from . import display

    taken = {
        what: path or "only emulated, when asked for" for what, path in paths.preferred.items()
    }
    modes = ", ".join(
        f"{mode} (auto)" if mode == paths.compute[0] else mode for mode in paths.compute
    )
    taken |= {"transformer's compute modes": modes or "none", **more}
    display.print_table(title, ["product", "path"], [list(row) for row in taken.items()])
    reasons = {
        **paths.reasons,
        **{f"mode {mode}": why for mode, why in paths.missing_modes.items()},
    }
    display.print_table(None, ["not taken", "because"], [list(row) for row in reasons.items()])
