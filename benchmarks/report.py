"""Rows of a benchmark: printed at once, and written as JSON with the machine."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def _output_of(*command: str) -> str | None:
    """Return the first line that a program prints; None if it fails or is missing."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except OSError:
        return None
    lines = result.stdout.splitlines()
    return lines[0].strip() if result.returncode == 0 and lines else None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def machine() -> dict[str, Any]:
    """Describe hardware and versions; None where something is missing.

    torch is not imported, because Linux counts a parent's memory into its children's peak.
    """
    from zimage_mxfp8 import _core

    gpu = _output_of("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    name, driver = gpu.split(", ") if gpu else (None, None)
    try:
        torch = version("torch")
    except PackageNotFoundError:
        torch = None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "gpu": name,
        "driver": driver,
        "cuda": _core.build_info().cuda or None,  # of this package's kernels
        "torch": torch,
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory),
        "python": platform.python_version(),
    }


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Report:
    """The rows of one run.

    `columns` has the name of each column and its unit, or "". A row may lack columns. The
    file is written after each row, so that an interrupted run keeps its measurements.
    """

    def __init__(self, suite: str, columns: Mapping[str, str], path: Path | None = None) -> None:
        self.rows: list[dict[str, Any]] = []
        self._columns = dict(columns)
        self._path = path
        self._header = {
            "suite": suite,
            "source": "measured",
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "commit": _output_of("git", "describe", "--always", "--dirty"),
            "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
            "machine": machine(),
        }
        print(json.dumps(self._header["machine"]), flush=True)

    def note(self, **facts: Any) -> None:
        """Write these to the file too, before its columns."""
        self._header |= facts

    def add(self, **row: Any) -> None:
        unknown = row.keys() - self._columns.keys()
        if unknown:
            raise KeyError(f"no such columns: {', '.join(sorted(unknown))}")
        if not self.rows or self.rows[-1].keys() != row.keys():
            units = (f"{name} ({unit})" if (unit := self._columns[name]) else name for name in row)
            print(f"\n| {' | '.join(units)} |\n|{' --- |' * len(row)}")
        print(f"| {' | '.join(map(_text, row.values()))} |", flush=True)
        self.rows.append(row)
        if self._path:
            content = {**self._header, "columns": self._columns, "rows": self.rows}
            self._path.write_text(to_json(content))


def to_json(content: Mapping[str, Any]) -> str:
    """Format a result file: one line per row."""
    head = json.dumps({k: v for k, v in content.items() if k != "rows"}, indent=1)
    rows = ",\n".join(f"  {json.dumps(row)}" for row in content["rows"])
    return f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'
