"""The most memory that a process has used."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def peak_resident_bytes() -> int | None:
    """Return the process's largest resident size; None where the system does not tell it."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux, where getrusage may give what the parent process used
        found = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) << 10
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10
