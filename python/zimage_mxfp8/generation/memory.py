"""The peak memory of a process."""

from __future__ import annotations

import re
import sys
from pathlib import Path


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
