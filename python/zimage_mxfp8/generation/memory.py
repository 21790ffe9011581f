"""The peak memory of a process or a CUDA device."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def peak_resident_bytes() -> int | None:
    """Return the process's peak resident size; None if the system does not provide it."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux, where getrusage may include the parent process
        found = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) << 10
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


class PeakMemory:
    """The most memory in use since this was made: of the device if it is CUDA's, or the process.

    There may be only one at a time.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(device)
        else:
            self._is_reset = _reset_peak()

    def nbytes(self) -> int | None:
        """Return it: on CUDA devices what torch allocated; None where the system does not tell."""
        if self._device.type == "cuda":
            import torch

            return torch.cuda.max_memory_allocated(self._device)
        return peak_resident_bytes() if self._is_reset else None


def _reset_peak() -> bool:
    """Let the process's peak begin again at what it uses now; only Linux can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False
