"""Make the small model's folder that the package ships, from the one that the training wrote.

python -m benchmarks.trained.ship TRAINED python/zimage_mxfp8/small_model

Run it in the repository: it also replaces the training's log and picture in benchmarks/results and
docs/images. The transformer is in MXFP8; the rest is copied. `examples.json` has captions with
seeds, and `examples/` what the original with BF16 weights draws for them, computed in float32.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import safe_open

import zimage_mxfp8 as zm
from zimage_mxfp8.generation.generator import ZImageGenerator
from zimage_mxfp8.generation.settings import GenerationSettings

from ..report import ROOT
from . import scenes

EXAMPLES = 3
_LOG = ROOT / "benchmarks" / "results" / "trained" / "training.log"
_SAMPLES = ROOT / "docs" / "images" / "small-model.png"
_PAGE = """# A small Z-Image that draws

All of Z-Image Turbo's blocks (30 + 2 + 2), 128 channels wide instead of 3840: {parameters:,}
parameters, trained with `python -m benchmarks.trained` on scenes that NumPy draws from captions.
No data and no weights of others are in it. Licence: Apache-2.0, as the package's.

`transformer.safetensors` is the MXFP8 file that `zimage-mxfp8 convert` makes of the original, whose
SHA-256 is {sha256}.
Give it to diffusers as `ZImagePipeline.from_pretrained(FOLDER, transformer=...)` with a
`ZImageTransformer` that was loaded from it. It draws scenes of 128 x 128 pixels in 8 steps without
guidance, from captions such as:

> {caption}

Its images follow the captions in colours, places and shapes; corners are a little round. It is
here to test the package and to compare formats on trained weights, not for its images.
"""
_FIRST_UNSEEN = 10**6 + 100  # seed of a scene that the training did not draw
_PARTS = ("text_encoder", "vae", "tokenizer", "scheduler", "model_index.json")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trained.ship",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("trained", type=Path, help="folder that python -m benchmarks.trained wrote")
    parser.add_argument("out", type=Path, help="the folder to write")
    arguments = parser.parse_args()
    ship(arguments.trained, arguments.out)


def ship(trained: Path, out: Path) -> None:
    """Write the folder, in place of an older one."""
    new = out.with_name(f"{out.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    _write(trained, new)
    shutil.rmtree(out, ignore_errors=True)
    new.rename(out)
    shutil.copy(trained / "training.log", _LOG)
    with Image.open(trained / "samples.png") as samples:
        shown = samples.convert("RGB").crop((0, 0, samples.width // 2, samples.height))
    shown.quantize(256, dither=Image.Dither.NONE).save(_SAMPLES, optimize=True)


def _write(trained: Path, out: Path) -> None:
    (out / "examples").mkdir(parents=True)
    for name in _PARTS:
        copy = shutil.copytree if (trained / name).is_dir() else shutil.copy
        copy(trained / name, out / name)
    zm.convert(trained / "transformer", out / "transformer.safetensors")
    generator = ZImageGenerator(trained, None, "cpu", dtype="float32")
    examples = []
    for i in range(EXAMPLES):
        caption = scenes.random_scene(np.random.default_rng(_FIRST_UNSEEN + i)).caption
        settings = GenerationSettings(caption, height=scenes.SIDE, width=scenes.SIDE, seed=i)
        generator.generate(settings).images[0].save(out / "examples" / f"{i}.png", optimize=True)
        examples.append({"prompt": caption, "seed": i, "image": f"examples/{i}.png"})
    (original,) = (trained / "transformer").glob("*.safetensors")
    digest = hashlib.sha256(original.read_bytes()).hexdigest()
    page = _PAGE.format(
        parameters=sum(math.prod(shape) for shape in header_shapes(original)),
        sha256=digest,
        caption=examples[0]["prompt"],
    )
    (out / "README.md").write_text(page, "utf-8")
    document = {"side": scenes.SIDE, "original_sha256": digest, "examples": examples}
    (out / "examples.json").write_text(json.dumps(document, indent=2) + "\n", "utf-8")


def header_shapes(file: Path) -> list[tuple[int, ...]]:
    """Return the shapes of a file's tensors."""
    with safe_open(file, "np") as opened:
        return [tuple(opened.get_slice(name).get_shape()) for name in opened.keys()]  # noqa: SIM118


if __name__ == "__main__":
    main()
