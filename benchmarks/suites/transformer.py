"""The whole transformer on a CUDA device, next to diffusers' BF16 model under torch.compile.

Speed, memory, loading, errors, where the time goes, and an image with `generate`, in one run. The
full size needs 20 GB of disk. In a build without CUDA kernels torch does the work, in its modes.

The checkpoint is synthetic. Inputs are random latents and captions. Peer: diffusers'
`ZImageTransformer2DModel` in BF16 with cuDNN's attention, its blocks compiled by torch.compile for
the shape that is timed ("regional" compilation, which diffusers recommends); with --whole also
compiled as a whole for the first shape. `generate` takes a folder with random parts of the real
sizes, except for the text encoder, which has 2 of 36 layers and a token for every byte.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from safetensors import safe_open

import zimage_mxfp8 as zm
from zimage_mxfp8.checkpoint.synthetic import write_synthetic_checkpoint
from zimage_mxfp8.transformer.compute import Compute, supported
from zimage_mxfp8.zimage.layers import zimage_shapes
from zimage_mxfp8.zimage.sampling import sampler_timesteps

from ..report import Report

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests" / "python"))
from helpers.model_folder import make_parts

PARTS = ("load", "start", "generate", "ours", "profile", "errors", "peer")
# Pixels of a side, images, caption tokens.
SHAPES = [(1024, 1, 128), (512, 1, 128), (1536, 1, 128), (2048, 1, 128), (1024, 4, 128)]
SHAPES.append((1024, 1, 512))
MODES: tuple[Compute, ...] = ("fp8", "weight-only", "int8")
COLUMNS = {
    "part": "",
    "mode": "",
    "image": "pixels of a side",
    "images": "",
    "caption_tokens": "",
    "ms": "ms, median",
    "peak_gb": "GB of device memory",
    "seconds": "s",
    "host_mib": "MiB of host memory above the process's own",
    "max_fold_error": "",
    "stage": "",
    "kernel": "",
    "launches": "",
    "output_error": "relative",
    "latents_error": "relative, after 8 steps",
    "deterministic": "",
}
Inputs = tuple[list[torch.Tensor], torch.Tensor, list[torch.Tensor]]

START = """
import sys, time
import torch, zimage_mxfp8 as zm
model = zm.ZImageTransformer.from_checkpoint(sys.argv[1], "cuda", sys.argv[2])
x = torch.randn(16, 1, 128, 128, device="cuda")
c = torch.randn(128, 2560, device="cuda")
for step in range(8):
    v = model([x], torch.tensor([step / 8], device="cuda"), [c]).sample[0]
    x = x - v.float() / 8
torch.cuda.synchronize()
"""

TEXT_ENCODER = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32}
# The command, with the times of the stages' first reports where it draws its progress bar.
GENERATE = """
import contextlib, json, sys, time
from zimage_mxfp8.cli import display, main
times = {}
display.stage_bar = lambda: contextlib.nullcontext(lambda p: times.setdefault(p.stage, time.time()))
code = main.main(["generate", *sys.argv[1:]])
import torch
print(json.dumps([times, torch.cuda.max_memory_allocated() / 1e9]))
sys.exit(code)
"""


def random_inputs(side: int, batch: int, tokens: int, seed: int = 0) -> Inputs:
    generator = torch.Generator("cuda").manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda").bfloat16()

    images = [randn(16, 1, side // 8, side // 8) for _ in range(batch)]
    times = torch.rand(batch, generator=generator, device="cuda")
    return images, times, [randn(tokens, 2560) for _ in range(batch)]


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Return the median time of a call, after warm-up."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def to_diffusers(name: str) -> list[str]:
    """Return diffusers' names of a ComfyUI-layout tensor, in stacking order."""
    if ".attention.qkv." in name:
        return [name.replace("qkv", f"to_{part}") for part in "qkv"]
    for old, new in (("out", "to_out.0"), ("q_norm", "norm_q"), ("k_norm", "norm_k")):
        name = name.replace(f"attention.{old}.", f"attention.{new}.")
    for old, new in (("x_embedder", "all_x_embedder.2-1"), ("final_layer", "all_final_layer.2-1")):
        if name.startswith(old + "."):
            name = name.replace(old, new, 1)
    return [name]


def load_peer(checkpoint: Path, dtype: torch.dtype) -> ZImageTransformer2DModel:
    with torch.device("meta"):
        peer = ZImageTransformer2DModel(axes_lens=[1536, 512, 512])
    state = {}
    with safe_open(checkpoint, "pt", device="cuda") as file:
        for name in file.keys():  # noqa: SIM118
            names = to_diffusers(name)
            for part, tensor in zip(names, file.get_tensor(name).chunk(len(names)), strict=True):
                state[part] = tensor.to(dtype)
    peer.load_state_dict(state, strict=True, assign=True)
    return peer.eval()


def modes(wanted: Sequence[Compute]) -> list[Compute]:
    """Return the modes that the device has."""
    return [mode for mode in wanted if mode in supported(torch.cuda.current_device())]


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def measure_load(file: Path, report: Report) -> None:
    torch.zeros(1, device="cuda")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    model = zm.ZImageTransformer.from_checkpoint(file, "cuda")
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(repr(model), flush=True)
    report.add(
        part="load",
        seconds=seconds,
        host_mib=(after - before) / 1024,
        max_fold_error=model.max_fold_error,
    )


def measure_start(file: Path, report: Report) -> None:
    """Return seconds from the process's start to the end of 8 steps, transformer alone."""
    for mode in modes(MODES):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", START, str(file), mode], check=True)
        report.add(part="start", mode=mode, seconds=time.perf_counter() - began)


def make_model_folder(path: Path) -> None:
    parts = make_parts(TEXT_ENCODER, VAE)
    ZImagePipeline(**parts, transformer=None).to(torch.bfloat16).save_pretrained(path)


def measure_generate(file: Path, report: Report) -> None:
    """Return seconds from the process's start to each stage's first report and to the PNG.

    "denoising" is first reported after its first step, other stages when they begin.
    """
    with tempfile.TemporaryDirectory() as folder:
        model, image = Path(folder) / "model", Path(folder) / "o.png"
        make_model_folder(model)
        command = [sys.executable, "-c", GENERATE, "--model-dir", str(model)]
        command += ["--transformer", str(file), "--prompt", "a cat", "-o", str(image)]
        for name, options in (("all parts kept", []), ("--offload", ["--offload"])):
            image.unlink(missing_ok=True)
            began = time.time()
            process = subprocess.run([*command, *options], check=True, stdout=subprocess.PIPE)
            times, peak = json.loads(process.stdout.splitlines()[-1])
            times["PNG"] = image.stat().st_mtime
            for stage, at in times.items():
                report.add(part="generate", mode=name, stage=stage, seconds=at - began)
            report.add(part="generate", mode=name, peak_gb=peak)


def add_forward(
    report: Report, mode: str, shape: tuple[int, int, int], ms: float, **row: float
) -> None:
    image, images, caption_tokens = shape
    report.add(
        part="forward",
        mode=mode,
        image=image,
        images=images,
        caption_tokens=caption_tokens,
        ms=ms,
        **row,
    )


def measure_ours(file: Path, repeats: int, report: Report) -> None:
    for mode in modes(MODES):
        free()
        model = zm.ZImageTransformer.from_checkpoint(file, "cuda", mode)
        for shape in SHAPES:
            inputs = random_inputs(*shape)
            torch.cuda.reset_peak_memory_stats()
            ms = milliseconds(lambda m=model, i=inputs: m(*i, return_dict=False), repeats)
            peak = torch.cuda.max_memory_allocated() / 1e9
            add_forward(report, mode, shape, ms, peak_gb=peak)
            model.to("cuda")  # drops the graph, and its memory with it
        del model


def measure_peer(checkpoint: Path, repeats: int, whole: bool, report: Report) -> None:
    free()
    peer = load_peer(checkpoint, torch.bfloat16)
    peer.set_attention_backend("_native_cudnn")
    if whole:
        inputs = random_inputs(*SHAPES[0])
        compiled = torch.compile(peer)
        with torch.no_grad():
            ms = milliseconds(lambda: compiled(*inputs, return_dict=False), repeats)
        add_forward(report, "diffusers, compiled whole", SHAPES[0], ms)
        torch._dynamo.reset()
    for shape in SHAPES:
        torch._dynamo.reset()
        peer.compile_repeated_blocks(dynamic=False)
        inputs = random_inputs(*shape)
        torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            ms = milliseconds(lambda i=inputs: peer(*i, return_dict=False), repeats)
        peak = torch.cuda.max_memory_allocated() / 1e9
        add_forward(report, "diffusers", shape, ms, peak_gb=peak)


def profile(file: Path, report: Report) -> None:
    """Report time and launches of each kernel in one forward, the longest first."""
    free()
    model = zm.ZImageTransformer.from_checkpoint(file, "cuda")
    inputs = random_inputs(*SHAPES[0])
    for _ in range(3):
        model(*inputs)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        model(*inputs)
        torch.cuda.synchronize()
    for row in sorted(profiler.key_averages(), key=lambda row: -row.self_device_time_total):
        ms = row.self_device_time_total / 1000
        if ms > 0:
            report.add(part="profile", kernel=row.key, ms=ms, launches=row.count)


def trajectory(model: torch.nn.Module, inputs: Inputs, dtype: torch.dtype) -> torch.Tensor:
    """Return the final latents of 8 Euler steps from the same noise."""
    times = [*(sampler_timesteps("turbo") / 1000).tolist(), 1.0]
    latents, captions = inputs[0][0].float(), [inputs[2][0].to(dtype)]
    for now, after in itertools.pairwise(times):
        t = torch.tensor([now], device="cuda")
        with torch.no_grad():
            v = model([latents.to(dtype)], t, captions, return_dict=False)[0][0]
        latents = latents + (after - now) * v.float()
    return latents


def measure_errors(checkpoint: Path, file: Path, report: Report) -> None:
    inputs = random_inputs(*SHAPES[0])
    wide = ([x.float() for x in inputs[0]], inputs[1], [c.float() for c in inputs[2]])
    free()
    reference = load_peer(checkpoint, torch.float32)
    with torch.no_grad():
        want = reference(*wide, return_dict=False)[0][0]
    final = trajectory(reference, inputs, torch.float32)
    del reference
    free()

    def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
        return ((found.float() - wanted).norm() / wanted.norm()).item()

    models: dict[str, Callable[[], torch.nn.Module]] = {
        "diffusers BF16": lambda: load_peer(checkpoint, torch.bfloat16),
        "ours BF16": lambda: zm.ZImageTransformer.from_checkpoint(checkpoint, "cuda"),
        **{
            mode: lambda mode=mode: zm.ZImageTransformer.from_checkpoint(file, "cuda", mode)
            for mode in modes(("weight-only", "mxfp8-emulated", "fp8", "int8"))
        },
    }
    for name, make in models.items():
        model = make()
        with torch.no_grad():
            outputs = [model(*inputs, return_dict=False)[0][0].clone() for _ in range(3)]
        ends = [trajectory(model, inputs, torch.bfloat16) for _ in range(2)]
        report.add(
            part="errors",
            mode=name,
            output_error=error(outputs[0], want),
            latents_error=error(ends[0], final),
            deterministic=all(torch.equal(outputs[0], o) for o in outputs) and torch.equal(*ends),
        )
        del model, outputs, ends
        free()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "zimage-mxfp8")
    parser.add_argument("--layers", type=int, default=30, help="main blocks, for a first look")
    parser.add_argument("--repeats", type=int, default=8, help="timed forwards of a shape")
    parser.add_argument("--whole", action="store_true", help="compile the peer as a whole too")


def run(arguments: argparse.Namespace, report: Report) -> None:
    arguments.folder.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.folder / f"bf16-{arguments.layers}.safetensors"
    file = arguments.folder / f"mxfp8-{arguments.layers}.safetensors"
    if not file.exists():
        write_synthetic_checkpoint(
            checkpoint, zimage_shapes(layers=arguments.layers), overwrite=True
        )
        zm.convert(checkpoint, file, overwrite=True)
    with file.open("rb", buffering=0) as content:  # into the page cache
        while content.read(1 << 24):
            pass
    if "load" in arguments.only:
        measure_load(file, report)
    if "start" in arguments.only:
        measure_start(file, report)
    if "generate" in arguments.only:
        measure_generate(file, report)
    if "ours" in arguments.only:
        measure_ours(file, arguments.repeats, report)
    if "profile" in arguments.only:
        profile(file, report)
    if "errors" in arguments.only:
        measure_errors(checkpoint, file, report)
    if "peer" in arguments.only:
        measure_peer(checkpoint, arguments.repeats, arguments.whole, report)
