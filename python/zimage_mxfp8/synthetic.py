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

from . import _core
from .checkpoint.header import TensorInfo, layout_header
from .checkpoint.output import AtomicFile, check_target
from .pipeline import Job, Lane, ProgressCallback, run_jobs

_CHUNK = 1 << 20  # elements that one job draws
_HEAD_DIM = 128
_PATCH_FEATURES = 64  # 2 x 2 patches of 16 latent channels


def zimage_shapes(
    dim: int = 3840, layers: int = 30, refiner_layers: int = 2, caption_dim: int = 2560
) -> dict[str, tuple[int, ...]]:
    """Name -> shape of Z-Image's tensors in the ComfyUI layout; the defaults are the real model's.

    Args:
        dim: width of the model, a multiple of 128.
        layers: number of main blocks.
        refiner_layers: number of blocks in each of the two refiners.
        caption_dim: features of the text encoder.
    """
    hidden = int(dim / 3 * 8)
    modulation = min(dim, 256)
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.weight": (dim, _PATCH_FEATURES),
        "x_embedder.bias": (dim,),
        "cap_embedder.0.weight": (caption_dim,),
        "cap_embedder.1.weight": (dim, caption_dim),
        "cap_embedder.1.bias": (dim,),
        "t_embedder.mlp.0.weight": (1024, 256),
        "t_embedder.mlp.0.bias": (1024,),
        "t_embedder.mlp.2.weight": (modulation, 1024),
        "t_embedder.mlp.2.bias": (modulation,),
        "x_pad_token": (1, dim),
        "cap_pad_token": (1, dim),
        "final_layer.linear.weight": (_PATCH_FEATURES, dim),
        "final_layer.linear.bias": (_PATCH_FEATURES,),
        "final_layer.adaLN_modulation.1.weight": (dim, modulation),
        "final_layer.adaLN_modulation.1.bias": (dim,),
    }
    stacks = {"layers": layers, "noise_refiner": refiner_layers, "context_refiner": refiner_layers}
    for stack, count in stacks.items():
        for i in range(count):
            block = f"{stack}.{i}."
            shapes[block + "attention.qkv.weight"] = (3 * dim, dim)
            shapes[block + "attention.out.weight"] = (dim, dim)
            shapes[block + "attention.q_norm.weight"] = (_HEAD_DIM,)
            shapes[block + "attention.k_norm.weight"] = (_HEAD_DIM,)
            shapes[block + "feed_forward.w1.weight"] = (hidden, dim)
            shapes[block + "feed_forward.w2.weight"] = (dim, hidden)
            shapes[block + "feed_forward.w3.weight"] = (hidden, dim)
            for norm in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
                shapes[f"{block}{norm}.weight"] = (dim,)
            if stack != "context_refiner":
                shapes[block + "adaLN_modulation.0.weight"] = (4 * dim, modulation)
                shapes[block + "adaLN_modulation.0.bias"] = (4 * dim,)
    return shapes


def write_synthetic_checkpoint(
    path: str | os.PathLike[str],
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    *,
    seed: int = 0,
    overwrite: bool = False,
    threads: int = 0,
    progress: ProgressCallback | None = None,
) -> None:
    """Write a BF16 checkpoint with random weights.

    Matrices are normal with a spread that differs from row to row and a few outliers; norms are
    near 1. The same shapes and seed give the same bytes.

    Args:
        path: file to write.
        shapes: name -> shape; the full-size Z-Image by default.
        seed: seed of the random numbers.
        overwrite: replace an existing file.
        threads: cores to use; 0 means all.
        progress: called with a `Progress` from this thread.

    Raises:
        OutputError: the file cannot be written, or exists already.
    """
    target = Path(path)
    check_target(target, (), overwrite=overwrite)
    tensors = {name: ("BF16", shape) for name, shape in (shapes or zimage_shapes()).items()}
    header, places = layout_header(tensors, {})
    size = max((info.end for info in places.values()), default=len(header))
    first = np.frombuffer(header, np.uint8)
    jobs = [Job("", 0, lambda lane: lane.write(0, first))]
    for name, info in places.items():
        count = info.nbytes // 2
        jobs += [
            _random_job(name, info, seed, begin, min(begin + _CHUNK, count))
            for begin in range(0, count, _CHUNK)
        ]
    with AtomicFile(target, size) as file:
        run_jobs(jobs, file, threads=threads, progress=progress)


def _random_job(name: str, info: TensorInfo, seed: int, begin: int, end: int) -> Job:
    def run(lane: Lane) -> None:
        key = np.random.SeedSequence([seed, zlib.crc32(name.encode()), begin])
        values = _draw(np.random.Generator(np.random.SFC64(key)), info.shape, begin, end - begin)
        bits = np.empty((1, values.size), np.uint16)
        _core.cast(values.reshape(1, -1), "float32", bits, "bfloat16", 1)
        lane.write(info.begin + 2 * begin, bits)

    return Job(name, 2 * (end - begin), run)


def _draw(
    random: np.random.Generator, shape: tuple[int, ...], begin: int, count: int
) -> npt.NDArray[np.float32]:
    values = random.standard_normal(count, dtype=np.float32)
    if len(shape) < 2:
        return values * np.float32(0.1) + np.float32(1.0)
    columns = shape[1]
    rows = (begin + np.arange(count)) // columns
    # A spread per row without drawing one: a smooth function of the row's number.
    spread = 0.02 * np.exp(0.3 * np.sin(np.arange(rows[0], rows[-1] + 1) * 0.7))
    values *= spread.astype(np.float32)[rows - rows[0]]
    outliers = random.integers(0, count, max(count // 4096, 1))
    values[outliers] *= 5
    return values
