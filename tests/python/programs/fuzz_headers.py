"""Mutated headers through every function that reads a checkpoint: a result or an error of ours.

    python tests/python/programs/fuzz_headers.py --seconds 60              # as CI does
    python tests/python/programs/fuzz_headers.py --count 100000            # that many headers
    python tests/python/programs/fuzz_headers.py --command-line --count 200

Anything else that is raised, a warning of a library too, ends the run with the mutation's seed,
which `--seed` repeats. Seeds are consecutive, so that a run is repeatable.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zimage_mxfp8 as zm
from zimage_mxfp8.adapters.files import open_adapter
from zimage_mxfp8.checkpoint.synthetic import write_synthetic_checkpoint
from zimage_mxfp8.cli.main import main
from zimage_mxfp8.transformer.model_file import open_model
from zimage_mxfp8.zimage.layers import zimage_shapes

Entries = dict[str, Any]

NAMES = (
    *("model.diffusion_model.x", "layers.0.attention.qkv.weight", "layers.1.new.weight", ""),
    *("layers.0.attention.to_q.lora_A.weight", "scaled_fp8", "a\nb", "\u0663", "ema.x_pad_token"),
    *("layers.99999999.attention.out.weight", "all_x_embedder.4-1.weight", "\ud83e\udd8a" * 50),
)
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**63, 2**70, 1.5, 1e400, "", "F32", "F8_E8M0", "F4", "Q8", [], {}, [[]]),
    *([0, 0], [1] * 40, [2**62, 4], [-1, 3], [0], [1.0, 2], {"dtype": "BF16"}, float("nan")),
)
MARKERS = (
    *('{"format": "mxfp8"}', "{", "[]", "null", '{"format": null}', '{"layers": []}', "[" * 5000),
    *('{"layers": {"layers.0.attention.out": {"format": "nvfp4"}}}', '{"layers": {"x": 3}}'),
    '{"layers": {"layers.0.attention.out": {"format": "mxfp8", "orig_shape": [1e9, -3]}}}',
)


def mutate(entries: Entries, rng: random.Random) -> None:
    """Change a header in one way."""
    names = [name for name in entries if name != "__metadata__"]
    name = rng.choice(names)
    entry = entries[name]
    way = rng.randrange(11)
    if way == 0:
        del entries[name]
    elif way == 1:
        entries[
            rng.choice((*NAMES, rng.choice(names) + rng.choice((".x", ".weight", "_scale"))))
        ] = entries.pop(name)
    elif way == 2 and isinstance(entry, dict) and entry:
        entry[rng.choice(sorted(entry))] = rng.choice(VALUES)
    elif way == 3 and isinstance(entry, dict) and isinstance(entry.get("shape"), list):
        entry["shape"] = rng.choice(
            (entry["shape"][::-1], [*entry["shape"], 1], [1, *entry["shape"]])
        )
    elif way == 4 and isinstance(entry, dict):
        entry["dtype"] = rng.choice(("F16", "I16", "U16", "F8_E4M3", "I8", "BOOL", "F64", "BF16"))
    elif way == 5:
        entries["__metadata__"] = rng.choice(
            (*VALUES, {"_quantization_metadata": rng.choice(MARKERS)})
        )
    elif way == 6:
        entries[name] = rng.choice(VALUES)
    elif way == 7:  # two tensors change places
        other = rng.choice(names)
        entries[name], entries[other] = entries[other], entries[name]
    elif way == 8:
        prefix = rng.choice(("model.diffusion_model.", "net.", "x.", "transformer.", "."))
        for old in names:
            entries[prefix + old] = entries.pop(old)
    elif way == 9:
        for old in rng.sample(names, min(len(names), rng.choice((2, 9, 40)))):
            del entries[old]
    else:
        entries[rng.choice(NAMES)] = dict(entry) if isinstance(entry, dict) else entry


def mutated(content: bytes, seed: int) -> bytes:
    """A file with a changed header, changed bytes, or both."""
    rng = random.Random(seed)
    length = int.from_bytes(content[:8], "little")
    text, data = content[8 : 8 + length], content[8 + length :]
    if rng.random() < 0.9:
        entries = json.loads(text)
        for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
            if len(entries) > 1:
                mutate(entries, rng)
        text = json.dumps(entries, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if rng.random() < 0.2:
        changed = bytearray(text)
        for _ in range(rng.choice((1, 4))):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        text = bytes(changed)
    if rng.random() < 0.2:
        noisy = bytearray(data)
        for _ in range(rng.choice((1, 100))):
            noisy[rng.randrange(len(noisy))] = rng.randrange(256)
        data = bytes(noisy)
    stated = (
        len(text) if rng.random() < 0.97 else rng.choice((0, 7, 2**40, 2**64 - 1, len(text) + 9))
    )
    cut = len(data) if rng.random() < 0.95 else rng.randrange(len(data))
    return stated.to_bytes(8, "little") + text + data[:cut]


def originals(folder: Path) -> list[bytes]:
    """Small files to begin with: plain, and converted."""
    shapes = zimage_shapes(128, 1, 1, 64, 96)
    write_synthetic_checkpoint(folder / "plain.safetensors", shapes, threads=1)
    zm.convert(folder / "plain.safetensors", folder / "mxfp8.safetensors", threads=1)
    return [(folder / f"{name}.safetensors").read_bytes() for name in ("plain", "mxfp8")]


def readers(folder: Path) -> dict[str, Callable[[Path], object]]:
    """The function behind each command that reads a checkpoint."""
    output = folder / "out.safetensors"
    return {
        "inspect": zm.inspect,
        "plan": zm.plan_conversion,
        "plan, any model": lambda path: zm.plan_conversion(
            path, zm.ConversionOptions(any_model=True)
        ),
        "convert": lambda path: zm.convert(path, output, overwrite=True, threads=1),
        "validate": lambda path: zm.validate(path, threads=1),
        "dequantize": lambda path: zm.dequantize_checkpoint(
            path, output, overwrite=True, threads=1
        ),
        "probe": lambda path: zm.probe(path, threads=1),
        "compare": lambda path: zm.compare(path, low_rank="none", threads=1),
        "load": open_model,
        "adapter": lambda path: list(
            open_adapter(path, zimage_shapes(128, 1, 1, 64, 96)).branches()
        ),
    }


def run_functions(
    path: Path, chosen: dict[str, Callable[[Path], object]], seen: Counter[str]
) -> None:
    for name, read in chosen.items():
        try:
            read(path)
            seen[f"{name}: result"] += 1
        except zm.Error as error:  # noqa: PERF203
            seen[f"{name}: error"] += 1
            if "\n" in str(error) or not str(error):
                raise AssertionError(f"{name}: not one sentence: {error!r}") from error


def run_command_line(path: Path, seen: Counter[str]) -> None:
    output = str(path.with_name("out.safetensors"))
    for arguments in (
        ["inspect", str(path)],
        ["validate", str(path)],
        ["convert", "-i", str(path), "-o", output, "--overwrite", "--threads", "1"],
        ["dequantize", str(path), "-o", output, "--overwrite", "--threads", "1"],
        ["probe", str(path)],
    ):
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            code = main(arguments)
        seen[f"{arguments[0]}: exit code {code}"] += 1
        if code not in (0, 1) or "Traceback" in errors.getvalue():
            raise AssertionError(f"{arguments}: {code}, {errors.getvalue()}")


def fuzz(
    count: int | None, seconds: float | None, seed: int, *, command_line: bool = False
) -> None:
    """Run until `count` headers or `seconds` are over."""
    warnings.simplefilter("error")
    seen: Counter[str] = Counter()
    begin, done = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files, chosen = originals(folder), readers(folder)
        path = folder / "mutated.safetensors"
        while (count is None or done < count) and (
            seconds is None or time.monotonic() - begin < seconds
        ):
            path.write_bytes(mutated(files[done % len(files)], seed + done))
            try:
                if command_line:
                    run_command_line(path, seen)
                else:
                    run_functions(path, chosen, seen)
            except BaseException:
                traceback.print_exc()
                print(f"seed {seed + done} ({'plain' if done % 2 == 0 else 'MXFP8'} file)")
                sys.exit(1)
            done += 1
    for what, number in sorted(seen.items()):
        print(f"{what:30} {number:,}")
    print(f"{done:,} mutated headers in {time.monotonic() - begin:.0f} s, first seed {seed}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--command-line", action="store_true")
    given = parser.parse_args()
    fuzz(given.count, given.seconds, given.seed, command_line=given.command_line)
