"""The memory that a conversion needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from zimage_mxfp8.checkpoint.header import layout_header


def write_zeros(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Write a sparse file of BF16 zeros, which takes no space on the disk."""
    header, places = layout_header({n: ("BF16", s) for n, s in shapes.items()}, {})
    with path.open("wb") as file:
        file.write(header)
        file.truncate(max(info.end for info in places.values()))


def peak_memory(source: Path, shapes: dict[str, tuple[int, ...]], **options: Any) -> float:
    """MiB that a process needs to convert a file of zeros with these tensors."""
    write_zeros(source, shapes)  # sparse, but real work: the zeros are read and encoded
    code = (
        "import json, re, sys, zimage_mxfp8 as zm\n"
        "zm.convert(sys.argv[1], sys.argv[1] + '.out', threads=2, **json.loads(sys.argv[2]))\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    )
    command = [sys.executable, "-c", code, str(source), json.dumps(options)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(result.stdout) / 1024
