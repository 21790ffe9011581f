"""Checkpoints with Z-Image's tensors and random weights, of any size and always the same.

For the demo, the tests and the benchmarks: real checkpoints are too large to ship.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .. import _core
from ..printing.progress import byte_bar, shown
from ..streaming.jobs import Job, ProgressCallback, header_job, run_jobs
from ..streaming.worker import Worker
from ..zimage.layers import ZIMAGE, zimage_shapes
from .header import TensorInfo, file_size, layout_header
from .output import AtomicFile, check_target

_CHUNK = 1 << 20  # elements that one job draws
_NORMS = ("norm", *(layer.name for layer in ZIMAGE.outside if layer.kind == "norm"))


def write_synthetic_checkpoint(
    path: str | os.PathLike[str],
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    *,
    seed: int = 0,
    overwrite: bool = False,
    threads: int = 0,
    progress: ProgressCallback | bool | None = None,
) -> None:
    """Write a BF16 checkpoint with random weights.

    Matrices are normal with a spread that differs from row to row and a few outliers; norms are
    near 1, biases near 0. The same shapes and seed give the same bytes.

    Args:
        path: file to write.
        shapes: name -> shape; the full-size Z-Image by default.
        seed: seed of the random numbers.
        overwrite: replace an existing file.
        threads: cores to use; 0 means all.
        progress: called with a `Progress` from this thread; True draws a bar on a terminal.

    Raises:
        OutputError: the file cannot be written, or exists already.
    """
    target = Path(path)
    check_target(target, (), overwrite=overwrite)
    tensors = {name: ("BF16", shape) for name, shape in (shapes or zimage_shapes()).items()}
    header, places = layout_header(tensors, {})
    jobs = [header_job(header)]
    for name, info in places.items():
        count = info.nbytes // 2
        jobs += [
            _random_job(name, info, seed, begin, min(begin + _CHUNK, count))
            for begin in range(0, count, _CHUNK)
        ]
    with (
        shown(progress, byte_bar("making weights")) as callback,
        AtomicFile(target, file_size(header, places), overwrite=overwrite) as file,
    ):
        run_jobs(jobs, file, threads=threads, progress=callback)


def _random_job(name: str, info: TensorInfo, seed: int, begin: int, end: int) -> Job:
    def run(worker: Worker) -> None:
        key = np.random.SeedSequence([seed, zlib.crc32(name.encode()), begin])
        random = np.random.Generator(np.random.SFC64(key))
        values = _draw(random, name, info.shape, begin, end - begin)
        bits = np.empty((1, values.size), np.uint16)
        _core.cast(values.reshape(1, -1), "float32", bits, "bfloat16", 1)
        worker.write(info.begin + 2 * begin, bits)

    return Job(name, 2 * (end - begin), run)


def _draw(
    random: np.random.Generator, name: str, shape: tuple[int, ...], begin: int, count: int
) -> npt.NDArray[np.float32]:
    values = random.standard_normal(count, dtype=np.float32)
    if len(shape) < 2:
        return values * np.float32(0.1) + np.float32(any(n in name for n in _NORMS))
    columns = shape[1]
    rows = (begin + np.arange(count)) // columns
    # A spread per row without drawing one: a smooth function of the row's number.
    spread = 0.02 * np.exp(0.3 * np.sin(np.arange(rows[0], rows[-1] + 1) * 0.7))
    values *= spread.astype(np.float32)[rows - rows[0]]
    outliers = random.integers(0, count, max(count // 4096, 1))
    values[outliers] *= 5
    return values
