"""Names of devices: "cpu", "cuda", "cuda:1"."""

from __future__ import annotations

import re

from . import _core
from .errors import UnsupportedError, UsageError


def cuda_index(device: str) -> int | None:
    """The index of the CUDA device that a name means; None for "cpu".

    Raises:
        UsageError: not the name of a device.
        UnsupportedError: this build has no CUDA, or this machine no such device.
    """
    device = str(device)  # a torch.device too
    if device == "cpu":
        return None
    match = re.fullmatch(r"cuda(?::([0-9]{1,3}))?", device)
    if match is None:
        raise UsageError(f'device must be "cpu", "cuda" or "cuda:N", not "{device[:40]}"')
    if not _core.build_info().cuda:
        raise UnsupportedError(
            f"device {device}: this build has no CUDA kernels; use cpu, or install with ZM_CUDA=ON"
        )
    index, found = int(match[1] or 0), len(_core.cuda_devices())
    if index >= found:
        raise UnsupportedError(f"device {device}: {found} CUDA devices found; use cpu")
    return index
