"""Conversion speed and memory, next to convert_to_quant and to the floor, in one run.

The full size is 12.3 GB, and needs 30 GB of disk and the peer; `--dim 1024` is for a first look.

The checkpoint is synthetic, always the same, and in the page cache when the programs start. The
floors read it once and write as many bytes as the conversion does, with fsync. Times are wall
times of whole processes; memory is the peak resident size that the system accounts to them.
The peer comes with `pip install ".[test]"`.

This module imports nothing large: Linux counts a parent's memory into its children's peak.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..report import Report

COLUMNS = {
    "program": "",
    "wall": "s, median",
    "fastest": "s",
    "slowest": "s",
    "cpu": "s, user and system, median",
    "peak": "MiB, largest",
    "runs": "",
    "speedup": "times the peer's speed",
}
CARD_EXCLUSIONS = (
    r"layers\.29\.attention\.qkv|layers\.(22|23|24|25|26|27|28|29)\.adaLN_modulation\.0|"
    r"context_refiner\.(0|1)\.attention\.out|context_refiner\.1\.feed_forward\.w2|"
    r"noise_refiner\.1\.attention\.(qkv|out)|noise_refiner\.1\.feed_forward\.w2|"
    r"noise_refiner\.(0|1)\.feed_forward\.w3"
)
CARD_OPTIONS = (
    *("--mxfp8", "--zimage", "--comfy_quant", "--save-quant-metadata", "--simple"),
    *("--low-memory", "--exclude-layers", CARD_EXCLUSIONS),
)
MAKE = """
import sys
from zimage_mxfp8.checkpoint.synthetic import write_synthetic_checkpoint
from zimage_mxfp8.zimage.layers import zimage_shapes
write_synthetic_checkpoint(sys.argv[1], zimage_shapes(int(sys.argv[2])))
"""
FLOOR = """
import mmap, os, sys
source, output, size, flags = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
buffer = memoryview(mmap.mmap(-1, 16 << 20))
with open(source, "rb", buffering=0) as file:
    while file.readinto(buffer):
        pass
fd = os.open(output, os.O_WRONLY | os.O_CREAT | flags)
while size > 0:
    size -= os.write(fd, buffer)
os.fsync(fd)
"""


@dataclass
class Process:
    """A process that ended: wall seconds, CPU seconds (user + system) and peak memory in MiB."""

    wall: float
    cpu: float
    peak: float


def spawn(command: Sequence[object], log: Path) -> Process:
    arguments = [str(part) for part in command]
    began = time.perf_counter()
    child = os.posix_spawn(
        arguments[0],
        arguments,
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
    )
    _, status, usage = os.wait4(child, 0)
    wall = time.perf_counter() - began
    if status != 0:
        sys.exit(f"{' '.join(arguments[:4])} ... failed, see {log}")
    return Process(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def warm(path: Path) -> None:
    """Bring a file into the page cache."""
    buffer = bytearray(8 << 20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dim", type=int, default=3840, help="width of the model")
    parser.add_argument("--runs", type=int, default=3, help="runs of ours and of the floor")
    parser.add_argument("--no-peer", action="store_true", help="leave convert_to_quant out")
    parser.add_argument("--cuda", action="store_true", help="encode on a CUDA device too")
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/data"))


def run(arguments: argparse.Namespace, report: Report) -> None:
    arguments.folder.mkdir(parents=True, exist_ok=True)
    source = arguments.folder / f"synthetic-{arguments.dim}.safetensors"
    output = arguments.folder / "output.safetensors"
    log = arguments.folder / "log.txt"
    if not source.exists():
        print(f"making {source}", flush=True)
        spawn([sys.executable, "-c", MAKE, source, arguments.dim], log)
    ours = Path(sys.executable).with_name("zimage-mxfp8")
    plan = subprocess.check_output([ours, "convert", "-i", source, "--dry-run", "--json"])
    size = json.loads(plan)["file_bytes"]
    peer = shutil.which("convert_to_quant", path=str(Path(sys.executable).parent))
    floor = [sys.executable, "-c", FLOOR, source, output, size]
    commands: dict[str, Sequence[object]] = {
        "floor: read once, write once through the cache, fsync": [*floor, 0],
        "floor: read once, write once directly, fsync": [*floor, getattr(os, "O_DIRECT", 0)],
        "zimage-mxfp8, the card's command": [
            *(ours, "convert", "-i", source, "-o", output),
            *CARD_OPTIONS,
        ],
        "zimage-mxfp8, recipe uniform": [ours, "convert", "-i", source, "-o", output],
    }
    if arguments.cuda:
        commands["zimage-mxfp8, the card's command, --device cuda"] = [
            *commands["zimage-mxfp8, the card's command"],
            *("--device", "cuda"),
        ]
    results: dict[str, list[Process]] = {name: [] for name in commands}
    for _ in range(arguments.runs):
        for name, command in commands.items():
            warm(source)
            results[name].append(spawn(command, log))
            output.unlink()
            os.sync()
    if not arguments.no_peer:
        if peer is None:
            sys.exit('convert_to_quant is missing: pip install ".[test]", or --no-peer')
        warm(source)
        name = "convert_to_quant 1.3.4, the card's command"
        results[name] = [spawn([peer, "-i", source, "-o", output, *CARD_OPTIONS], log)]
        output.unlink()

    peer_wall = None if arguments.no_peer else results[name][0].wall
    for program, processes in results.items():
        walls = sorted(process.wall for process in processes)
        wall = statistics.median(walls)
        row = {
            "program": program,
            "wall": wall,
            "fastest": walls[0],
            "slowest": walls[-1],
            "cpu": statistics.median(process.cpu for process in processes),
            "peak": max(process.peak for process in processes),
            "runs": len(processes),
        }
        report.add(**row, **({"speedup": peer_wall / wall} if peer_wall else {}))
    starts = [spawn([ours, "--help"], log).wall for _ in range(9)]
    report.add(program="zimage-mxfp8 --help", wall=statistics.median(starts), runs=len(starts))
