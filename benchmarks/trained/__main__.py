"""Train a small Z-Image on drawn scenes and write it as a diffusers folder in BF16.

python -m benchmarks.trained OUT [--device cuda] [--dim 384] [--quick]

All of Z-Image's 30 + 2 + 2 blocks, `--dim` channels wide, with a tokenizer, a text encoder, a VAE
and a scheduler that ZImagePipeline loads. The training is deterministic on one kind of device.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline
from PIL import Image

from . import scenes, text, transformer, vae

_SHOWN = 16


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trained",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, help="the folder to write")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--dim", type=int, default=128, help="channels, a multiple of 128")
    parser.add_argument("--quick", action="store_true", help="a few steps, to try the program")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True)
    with (arguments.out / "training.log").open("w", encoding="utf-8") as file:
        begin = time.perf_counter()

        def log(line: str) -> None:
            line = f"[{time.perf_counter() - begin:6.1f} s] {line}"
            print(line, flush=True)
            print(line, file=file, flush=True)

        train(arguments, log)


def train(arguments: argparse.Namespace, log: Callable[[str], None]) -> None:
    """Run all parts and write the folder."""
    device, quick = arguments.device, arguments.quick
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Every value is written before it is read; filling memory first would take half of the time.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cuda.matmul.allow_tf32 = True
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    log(f"torch {torch.__version__} on {name}, {arguments.dim} channels")

    drawn = scenes.draw_many(64 if quick else scenes.TRAINING_SCENES)
    captions = [scene.caption for scene, _ in drawn]
    images = torch.from_numpy(np.stack([image for _, image in drawn]))
    log(f"drew {len(images)} scenes, {len(set(captions))} different captions")

    images = images.to(device)
    codec = vae.train_vae(images, 2 if quick else 1500, device, log)
    codec = codec.to("cpu", torch.bfloat16).to(device)
    latents = vae.encode(codec, images, device)
    scale, shift = codec.config.scaling_factor, codec.config.shift_factor
    log(f"VAE: {_count(codec)} parameters, scale {scale}, shift {shift}")
    latents = ((latents - shift) * scale).to(device, torch.bfloat16)

    tokenizer = text.make_tokenizer()
    encoder = text.make_text_encoder(tokenizer)
    encode = text.CaptionEncoder(tokenizer, encoder.to(device))
    features = [x for i in range(0, len(captions), 512) for x in encode(captions[i : i + 512])]
    padded = transformer.pad_captions(features, device)

    model = transformer.make_transformer(arguments.dim).to(device)
    difference = transformer.check_batched(model, padded, device)
    log(f"transformer: {_count(model)} parameters; batched forward differs by {difference:.1e}")
    schedule = transformer.Schedule()
    if quick:
        schedule = transformer.Schedule(4, 2, 4, 2, 2)
    transformer.train_transformer(
        model, transformer.to_patches(latents), padded, schedule, device, log
    )
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
        vae=codec,
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=model.to(torch.bfloat16),
    )
    pipeline.save_pretrained(arguments.out)
    for file in sorted(arguments.out.rglob("*.safetensors")):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        log(f"sha256 {digest} {file.relative_to(arguments.out)}")
    shown, steps = (2, (4,)) if quick else (_SHOWN, (4, 8, 20))
    show(pipeline.to(device), arguments.out, shown, steps, log)


def show(
    pipeline: ZImagePipeline,
    out: Path,
    count: int,
    rows_of_steps: Sequence[int],
    log: Callable[[str], None],
) -> None:
    """Draw unseen scenes, a row for each number of steps, under the true ones."""
    unseen = [scenes.random_scene(np.random.default_rng(10**6 + i)) for i in range(count)]
    rows = [np.concatenate([scenes.to_bytes(scenes.draw(scene)) for scene in unseen], 1)]
    for steps in rows_of_steps:
        images = pipeline(
            [scene.caption for scene in unseen],
            height=scenes.SIDE,
            width=scenes.SIDE,
            num_inference_steps=steps,
            guidance_scale=0.0,
            generator=torch.Generator("cpu").manual_seed(0),
            output_type="np",
        ).images
        rows.append(np.concatenate((images * 255).round().astype(np.uint8), 1))
    Image.fromarray(np.concatenate(rows)).save(out / "samples.png")
    for scene in unseen:
        log(f"sample: {scene.caption}")


def _count(module: torch.nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()):,}"


if __name__ == "__main__":
    main()
