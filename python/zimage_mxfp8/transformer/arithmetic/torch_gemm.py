"""Whether torch has a GEMM of 8-bit operands on a CUDA device."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...system import devices


def unsupported(
    device: int,
    first: tuple[int, int],
    operands: str,
    scaling: str,
    trial: Callable[[torch.device], str],
) -> str:
    """Return why torch does not multiply some operands on a device; "" if it does.

    That depends on the version of torch as much as on the device, so a GEMM is tried.

    Args:
        device: index of a CUDA device.
        first: the lowest compute capability.
        operands: name of the operands' format.
        scaling: what the GEMM does with scales, with a space before it, or nothing.
        trial: returns the error of a GEMM on the device; "" if it succeeds.
    """
    if device >= torch.cuda.device_count():
        return f"the torch that is installed ({torch.__version__}) finds no CUDA device {device}"
    capability = devices.capability(device)
    name = f"{torch.cuda.get_device_name(device)} ({capability[0]}.{capability[1]})"
    if capability < first:
        needed = f"{first[0]}.{first[1]} or newer"
        return f"{operands} GEMMs need compute capability {needed}, and this is {name}"
    if not (why := trial(torch.device("cuda", device))):
        return ""
    return f"torch {torch.__version__} has no {operands} GEMM{scaling} on {name}: {why}"
