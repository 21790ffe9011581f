"""The report of `diagnose`."""

from __future__ import annotations

from ..system.devices import HOW_TO_GET_KERNELS
from ..system.diagnosis import Diagnosis, Kernels
from .screen import Screen, size_text


def print_diagnosis(found: Diagnosis, screen: Screen) -> None:
    """Print a `Diagnosis`."""
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
    screen.table("Installation", ["what", "version"], rows)
    _print_kernels(screen, "CPU", found.cpu, {})
    if not found.devices:
        screen.text(f"No CUDA device: {found.no_devices}. Everything runs on the CPU.")
    for device in found.devices:
        memory = size_text(device.memory)
        title = f"{device.name}, compute capability {device.capability}, {memory}"
        other = ("without kernels", device.without_kernels)
        if not device.kernels:
            other = ("with kernels", device.with_kernels)
        _print_kernels(
            screen, title, device.gemm, {f"compute modes {other[0]}": ", ".join(other[1])}
        )
    if found.devices and not found.cuda:
        screen.text(f"To get CUDA kernels, {HOW_TO_GET_KERNELS}.")
    screen.table(
        "Extras",
        ["extra", "missing", "command to install it"],
        [
            [
                extra.name,
                ", ".join(extra.missing) or "nothing",
                extra.command if extra.missing else "",
            ]
            for extra in found.extras
        ],
    )


def _print_kernels(screen: Screen, title: str, found: Kernels, more: dict[str, str]) -> None:
    taken = {
        what: kernel or "only the reference, if chosen by name"
        for what, kernel in found.chosen.items()
    }
    modes = ", ".join(
        f"{mode} (auto)" if mode == found.compute[0] else mode for mode in found.compute
    )
    taken |= {
        "transformer's compute modes": modes or "none",
        **more,
        "transformer's default dtype": found.dtype,
    }
    screen.table(title, ["what", "taken"], [list(row) for row in taken.items()])
    reasons = {
        **found.reasons,
        **{f"mode {mode}": why for mode, why in found.missing_modes.items()},
    }
    screen.table(None, ["not taken", "because"], [list(row) for row in reasons.items()])
