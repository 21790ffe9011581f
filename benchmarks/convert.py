"""Conversion speed and memory, beside convert_to_quant and beside the floor, in one run.

    python benchmarks/convert.py            # full size: 12.3 GB, needs 30 GB of disk and the peer
    python benchmarks/convert.py --dim 1024 # smaller, for a first look

The checkpoint is synthetic, always the same, and in the page cache when the programs start. The
floors read it once and write as many bytes as the conversion does, with fsync. Times are wall
times of whole processes; memory is the peak resident size that the system accounts to them.
The peer comes with `pip install ".[test]"`.

This script imports nothing large: Linux counts a parent's memory into its children's peak.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
from zimage_mxfp8.zimage.layers import zimage_shapes
from zimage_mxfp8.synthetic import write_synthetic_checkpoint
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
class Run:
    """One process: wall seconds, CPU seconds (user + system) and peak memory in MiB."""

    wall: float
    cpu: float
    peak: float


def run(command: Sequence[object], log: Path) -> Run:
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
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def warm(path: Path) -> None:
    """Bring a file into the page cache."""
    buffer = bytearray(8 << 20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def machine() -> str:
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{len(os.sched_getaffinity(0))} cores of {model}, {memory:.0f} GiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=3840, help="width of the model")
    parser.add_argument("--runs", type=int, default=3, help="runs of ours and of the floor")
    parser.add_argument("--no-peer", action="store_true", help="leave convert_to_quant out")
    parser.add_argument("--cuda", action="store_true", help="encode on a CUDA device too")
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/data"))
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()

    arguments.folder.mkdir(parents=True, exist_ok=True)
    source = arguments.folder / f"synthetic-{arguments.dim}.safetensors"
    output = arguments.folder / "output.safetensors"
    log = arguments.folder / "log.txt"
    if not source.exists():
        print(f"making {source}", flush=True)
        run([sys.executable, "-c", MAKE, source, arguments.dim], log)
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
    results: dict[str, list[Run]] = {name: [] for name in commands}
    for _ in range(arguments.runs):
        for name, command in commands.items():
            warm(source)
            results[name].append(run(command, log))
            output.unlink()
            os.sync()
    if not arguments.no_peer:
        if peer is None:
            sys.exit('convert_to_quant is missing: pip install ".[test]", or --no-peer')
        warm(source)
        name = "convert_to_quant 1.3.4, the card's command"
        results[name] = [run([peer, "-i", source, "-o", output, *CARD_OPTIONS], log)]
        output.unlink()

    reference = statistics.median(r.wall for r in list(results.values())[-1])
    print(f"{source.stat().st_size / 1e9:.2f} GB checkpoint; {machine()}\n")
    print("| program | wall, median (s) | min-max | CPU (s) | peak memory (MiB) | speed-up |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, runs in results.items():
        walls = sorted(r.wall for r in runs)
        median = statistics.median(walls)
        cpu = statistics.median(r.cpu for r in runs)
        factor = "" if arguments.no_peer else f"{reference / median:.1f}x"
        print(
            f"| {name} | {median:.1f} | {walls[0]:.1f}-{walls[-1]:.1f} | {cpu:.1f} "
            f"| {max(r.peak for r in runs):.0f} | {factor} |"
        )
    starts = [run([ours, "--help"], log).wall for _ in range(9)]
    print(f"\nstart-up, zimage-mxfp8 --help: {statistics.median(starts):.2f} s, median of 9")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({n: [vars(r) for r in runs] for n, runs in results.items()}, indent=1)
        )


if __name__ == "__main__":
    main()
