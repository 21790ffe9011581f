"""Serve the small trained model by vLLM-Omni or SGLang, and compare its images with `generate`'s.

    python tests/python/programs/other_servers.py vllm-omni|sglang [--environment DIR]

Installs the server from PyPI, 150 to 250 MB, into a virtual environment on top of this one. The
modules in tests/other_servers/aids let it run on a CPU: see there. Takes a minute or two.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openai
import torch
from PIL import Image
from safetensors.torch import save_file

import zimage_mxfp8 as zm
from zimage_mxfp8.generation.small_model import FOLDER, TRANSFORMER

FILES = Path(__file__).parents[2] / "other_servers"
PROMPT = "a red circle"
STEPS = 4
WITHOUT_LIBRARIES = ("torchaudio", "vllm")  # theirs need CUDA, or are not used here


def install(server: str, folder: Path) -> Path:
    """Make a virtual environment with a server on top of this one; return its Python."""
    venv.create(folder, with_pip=True, clear=True)
    python = folder / "bin/python"
    pip = [python, "-m", "pip", "install", "-q", "--no-deps", "--disable-pip-version-check"]
    subprocess.run([*pip, "-r", FILES / f"{server}.txt"], check=True)
    paths = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", vars=paths))
    for package in WITHOUT_LIBRARIES:
        for library in (packages / package).rglob("*.so"):
            library.unlink()
    ours = sysconfig.get_path("purelib")
    aids = [str(FILES / "aids" / name) for name in ("common", server)]
    lines = [f"import site; site.addsitedir({ours!r})", *aids]
    (packages / "aids.pth").write_text("\n".join(lines))
    about = packages / "aids-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: aids\nVersion: 1\n")
    (about / "entry_points.txt").write_text(
        "[vllm_omni.platform_plugins]\ncpu = vllm_omni_platform:name\n"
    )
    return python


class Server:
    """A running server, and `generate` as the reference.

    Attributes:
        client: for it.
        generator: with the same model.
        folder: for files of the tests.
    """

    def __init__(self, address: str, folder: Path) -> None:
        self.client = openai.OpenAI(
            base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120
        )
        self.generator = zm.ZImageGenerator(FOLDER, TRANSFORMER, "cpu", dtype="float32")
        self.folder = folder

    def ask(self, size: str = "64x64", n: int = 1, **fields: Any) -> list[Image.Image]:
        """Ask for images by a prompt."""
        more = {"num_inference_steps": STEPS, "output_format": "png", **fields}
        made = self.client.images.generate(
            prompt=PROMPT, size=size, n=n, response_format="b64_json", extra_body=more
        )
        return images_of(made)

    def edit(self, image: bytes, **fields: Any) -> list[Image.Image]:
        """Ask for an image by another one."""
        made = self.client.images.edit(
            image=("image.png", image, "image/png"),
            prompt=PROMPT,
            size="auto",
            extra_body={"num_inference_steps": STEPS, **fields},
        )
        return images_of(made)

    def check(self, what: str, images: list[Image.Image], **settings: Any) -> None:
        """Compare images with those of the generator, bit by bit."""
        values = {"steps": STEPS, "seed": 1, **settings}
        if "init_image" not in values:
            values |= {"width": 64, "height": 64}
        expected = self.generator.generate(zm.GenerationSettings(PROMPT, **values)).images
        assert len(images) == len(expected), what
        for image, each in zip(images, expected, strict=True):
            assert image.tobytes() == each.tobytes(), f"{what}: the image differs"
        print(f"  {what}: the same", flush=True)

    def check_guidance(self) -> None:
        images = self.ask(seed=1, guidance_scale=3.0, negative_prompt="blue")
        self.check("guidance", images, guidance=3.0, negative_prompt="blue")

    def refuses_values(self) -> None:
        self.refused("a size", "size must be a multiple of 16", lambda: self.ask("72x64"))
        self.refused(
            "a negative prompt", "add guidance_scale", lambda: self.ask(negative_prompt="blue")
        )

    def refused(self, what: str, words: str, ask: Callable[[], object]) -> None:
        """Check that a request gets status 400 and a sentence."""
        try:
            ask()
        except openai.BadRequestError as error:
            assert words in error.response.text, f"{what}: {error.response.text}"
        else:
            raise AssertionError(f"{what} was not refused")
        print(f"  {what}: refused", flush=True)


def images_of(made: Any) -> list[Image.Image]:
    files = [base64.b64decode(each.b64_json) for each in made.data]
    return [Image.open(io.BytesIO(file)).convert("RGB") for file in files]


def as_url(file: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(file).decode()}"


def picture(width: int, height: int, seed: int = 0) -> tuple[bytes, Image.Image]:
    """Return a PNG file of random pixels, and the image."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue(), image


def write_lora(path: Path) -> None:
    """Write an adapter for a layer of the small model."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        width = zm.ZImageTransformer.from_checkpoint(TRANSFORMER, "cpu").config.dim
    name = "diffusion_model.layers.0.attention.out"
    save_file(
        {
            f"{name}.lora_A.weight": torch.randn(4, width, generator=random) * 0.1,
            f"{name}.lora_B.weight": torch.randn(width, 4, generator=random) * 0.1,
        },
        path,
    )


def check_vllm_omni(server: Server) -> None:
    """Check what the pipeline does in vLLM-Omni."""
    plain = server.ask(seed=1)
    server.check("text to image", plain)
    server.check("two images", server.ask(n=2, seed=1), batch=2)
    server.check_guidance()
    file, image = picture(80, 72)  # 72 is no multiple of 16: the size becomes 80 x 64
    server.check("image to image", server.edit(file, seed=1), init_image=image)
    server.check(
        "strength", server.edit(file, seed=1, strength=0.9), init_image=image, strength=0.9
    )
    mask_file, mask = picture(80, 72, seed=1)
    server.check(
        "a mask",
        server.edit(file, seed=1, mask_image=as_url(mask_file)),
        init_image=image,
        mask_image=mask,
    )
    lora = server.folder / "lora.safetensors"
    write_lora(lora)
    merged = server.ask(seed=1, lora={"name": "ink", "path": str(lora), "scale": 0.8})
    assert merged[0].tobytes() != plain[0].tobytes()
    server.check("an adapter", merged, loras=[(lora, 0.8)])
    server.check("none again", server.ask(seed=1))

    server.refuses_values()
    missing = {"name": "none", "path": str(server.folder / "none.safetensors")}
    server.refused("a missing adapter", "does not exist", lambda: server.ask(lora=missing))

    # A drawing of many minutes, whose client goes away: the next client would wait for its end.
    try:
        server.client.with_options(timeout=3).images.generate(
            prompt=PROMPT, size="1024x1024", extra_body={"num_inference_steps": 200}
        )
    except openai.APITimeoutError:
        server.check("after a cancelled request", server.ask(seed=1))
    else:
        raise AssertionError("a drawing of 200 steps took less than 3 s")


def check_sglang(server: Server) -> None:
    """Check what the pipeline does in SGLang."""
    server.check("text to image", server.ask(seed=1))
    server.check("two images", server.ask(n=2, seed=1), batch=2)
    server.check_guidance()
    server.refuses_values()


def command_of_vllm_omni(python: Path, port: int, _folder: Path) -> list[str]:
    """Return the command that serves the small model."""
    options = f'{{"transformer": "{TRANSFORMER}"}}'
    return [
        *[str(python), str(FILES / "aids/vllm-omni/serve.py"), "serve", str(FOLDER), "--omni"],
        *["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"],
        *["--custom-pipeline-args", options],
    ]


def command_of_sglang(python: Path, port: int, folder: Path) -> list[str]:
    """Return the command that serves the small model."""
    model = folder / "model"
    shutil.copytree(FOLDER, model)
    (model / "transformer").mkdir()  # SGLang asks for it
    return [
        *[str(python), str(FILES / "aids/sglang/serve.py"), "serve", "--model-path", str(model)],
        *["--host", "127.0.0.1", "--port", str(port), "--dit-precision", "fp32"],
        *["--pipeline-class-name", "ZImageMXFP8Pipeline", "--warmup-mode", "off"],
        *["--transformer-weights-path", str(TRANSFORMER)],
    ]


# Without this package's options the servers must use their own pipelines. vLLM-Omni's cannot be
# made without the libraries of vLLM, so a class takes its place.
OWN_IN_VLLM_OMNI = """
import torchvision_operators
from types import SimpleNamespace
from zimage_mxfp8.plugins import vllm_omni

class Own:
    def __init__(self, *, od_config, prefix):
        pass

vllm_omni.own.ZImagePipeline = Own
for given in (None, {}, {"other": 1}):
    config = SimpleNamespace(custom_pipeline_args=given)
    assert type(vllm_omni.ZImagePipeline(od_config=config)) is Own, given
"""
OWN_IN_SGLANG = """
import torchvision_operators
from sglang.multimodal_gen.registry import get_pipeline_class
from sglang.multimodal_gen.runtime.platforms.plugins import load_plugins

load_plugins()
assert get_pipeline_class("ZImagePipeline").__module__.startswith("sglang.")
assert get_pipeline_class("ZImageMXFP8Pipeline").__module__ == "zimage_mxfp8.plugins.sglang"
"""
SERVERS = {
    "vllm-omni": (command_of_vllm_omni, check_vllm_omni, OWN_IN_VLLM_OMNI),
    "sglang": (command_of_sglang, check_sglang, OWN_IN_SGLANG),
}


@contextmanager
def running(words: list[str], port: int, log: Path) -> Iterator[str]:
    """Run a server; yields its address when it answers."""
    address = f"http://127.0.0.1:{port}"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("w") as file:
        process = subprocess.Popen(
            words,
            stdout=file,
            stderr=file,
            env=environment,
            cwd=log.parent,  # SGLang writes images there
            start_new_session=True,
        )
    try:
        end = time.monotonic() + 180
        while not answers(f"{address}/health"):
            assert process.poll() is None, "the server ended"
            assert time.monotonic() < end, "the server does not answer"
            time.sleep(0.5)
        yield address
    except BaseException:
        print(log.read_text()[-8000:], file=sys.stderr)
        raise
    finally:
        os.killpg(process.pid, 15)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except OSError:
        return False


def main(server: str, environment: Path | None) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python = (
            environment / "bin/python"
            if environment and environment.exists()
            else install(server, environment or folder / "environment")
        )
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        print(server, flush=True)
        command, check, own = SERVERS[server]
        subprocess.run([python, "-c", own], check=True, capture_output=True, text=True)
        print("  its own pipeline for others: there", flush=True)
        if server == "sglang":
            program = Path(__file__).with_name("sglang_checkpoint.py")
            subprocess.run([python, program], check=True)
        with running(command(python, port, folder), port, folder / "log.txt") as address:
            check(Server(address, folder))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("server", choices=SERVERS)
    parser.add_argument(
        "--environment",
        type=lambda name: Path(name).resolve(),
        help="folder to keep or take the server from",
    )
    arguments = parser.parse_args()
    main(arguments.server, arguments.environment)
