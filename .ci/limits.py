"""Run a command with limits on time and memory, and report what it used.

    python .ci/limits.py MINUTES GIGABYTES COMMAND...

Memory is that of all of its processes at the same time, sampled five times per second, or that of
the largest process, which the system knows exactly. A command that takes too long is killed.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PERIOD = 0.2  # seconds


def processes(session: int) -> Iterator[Path]:
    """Yield the folders in /proc of a session's processes: pip, ninja and compilers stay in it."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                yield folder


def memory(session: int) -> int:
    """Return bytes in memory; pages that processes share count for each."""
    pages = 0
    for folder in processes(session):
        with suppress(OSError):
            pages += int((folder / "statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main(minutes: float, gigabytes: float, command: list[str]) -> int:
    start, peak = time.monotonic(), 0
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            while process.poll() is None and time.monotonic() - start < minutes * 60:
                peak = max(peak, memory(process.pid))
                with suppress(subprocess.TimeoutExpired):
                    process.wait(PERIOD)
        finally:
            late = process.poll() is None
            for folder in processes(process.pid):
                with suppress(OSError):
                    os.kill(int(folder.name), signal.SIGKILL)
    took = (time.monotonic() - start) / 60
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    peak = max(peak, largest)
    print(
        f"{'killed after' if late else 'took'} {took:.1f} of {minutes:g} minutes, and "
        f"{peak / 1e9:.2f} of {gigabytes:g} GB of memory ({largest / 1e9:.2f} in one process)"
    )
    return 1 if late or peak > gigabytes * 1e9 else process.returncode


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
