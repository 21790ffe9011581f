"""The example workflows through the API of ComfyUI's server, with small models."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import zimage_mxfp8 as zm
from helpers.adapter_files import random
from helpers.comfyui_nodes import HIDDEN
from helpers.comfyui_sizes import CAPTION, DIM
from helpers.documents import ROOT
from helpers.serving import image_file
from zimage_mxfp8.checkpoint.synthetic import write_synthetic_checkpoint
from zimage_mxfp8.zimage.layers import zimage_shapes

pytestmark = pytest.mark.comfyui

LAYERS = 30  # ComfyUI spreads a ControlNet's blocks over 30 in any case
SPEED_UP = "ZImageMXFP8SpeedUp"
SMALL = {
    "CLIPLoader": "LoadSmallCLIP",
    "VAELoader": "LoadSmallVAE",
    "ModelPatchLoader": "LoadSmallControlNet",
}
# A torchvision for CUDA lacks operators beside a torch for CPUs.
PROGRAM = """
import runpy, sys, torch
library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Server:
    """A running ComfyUI."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._nodes = self._ask("/object_info")
        self._drawn: dict[tuple[str, bool], dict[str, Any]] = {}

    def _ask(self, path: str, content: Any = None) -> Any:
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(
            self._address + path, data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            body = response.read()
        return json.loads(body) if body else None

    def free(self) -> None:
        """Unload all models and forget all results."""
        self._ask("/free", {"unload_models": True, "free_memory": True})

    def drawn(self, name: str, *, fast: bool) -> dict[str, Any]:
        """Return what the first drawing of a workflow has shown, see `draw`."""
        if (name, fast) not in self._drawn:
            self._drawn[name, fast] = self.draw(name, fast=fast)
        return self._drawn[name, fast]

    def draw(self, name: str, *, fast: bool) -> dict[str, Any]:
        """Draw a workflow; return what the node Report shows."""
        graph = self._graph(name, fast)
        number = self._ask("/prompt", {"prompt": graph})["prompt_id"]
        while not (found := self._ask(f"/history/{number}")):
            time.sleep(0.2)
        status, outputs = found[number]["status"], found[number]["outputs"]
        assert status["status_str"] == "success", status
        assert any("images" in each for each in outputs.values())
        return next(each for each in outputs.values() if "latents" in each)

    def _graph(self, name: str, fast: bool) -> dict[str, Any]:
        """Return a workflow as the API takes it: small, and with or without the speed-up."""
        workflow = json.loads((ROOT / "examples" / "comfyui" / f"{name}.json").read_text("utf-8"))
        sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
        graph = {}
        for node in workflow["nodes"]:
            inputs = self._inputs(node, sources)
            if node["type"] == "EmptySD3LatentImage":
                inputs |= {"width": 80, "height": 64}
            if node["type"] == "KSampler":
                inputs["steps"] = 2
                report = {"model": inputs["model"], "samples": [str(node["id"]), 0]}
                graph["report"] = {"class_type": "Report", "inputs": report}
            small = SMALL.get(node["type"])
            graph[str(node["id"])] = {
                "class_type": small or node["type"],
                "inputs": {} if small else inputs,
            }
        if not fast:
            (number,) = (i for i, node in graph.items() if node["class_type"] == SPEED_UP)
            source = graph.pop(number)["inputs"]["model"]
            for node in graph.values():
                for key, value in node["inputs"].items():
                    if value == [number, 0]:
                        node["inputs"][key] = source
        return graph

    def _inputs(self, node: dict[str, Any], sources: dict[int, Any]) -> dict[str, Any]:
        """Return a node's inputs: links, and widgets in the order that the server names."""
        links = {each["name"]: sources[each["link"]] for each in node["inputs"]}
        wanted = self._nodes[node["type"]]["input"]
        values = iter(node["widgets_values"])
        inputs = {}
        for name, (kind, *settings) in (wanted["required"] | wanted.get("optional", {})).items():
            if name in links:
                inputs[name] = links[name]
            elif isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"):
                inputs[name] = next(values)
                if settings and settings[0].get("control_after_generate"):
                    next(values)
        return inputs


def write_models(folder: Path) -> None:
    """Write what the workflows name."""
    original = folder / "models" / "original.safetensors"
    for name in ("diffusion_models", "loras"):
        (folder / "models" / name).mkdir(parents=True)
    shapes = zimage_shapes(dim=DIM, layers=LAYERS, caption_dim=CAPTION, hidden=HIDDEN)
    write_synthetic_checkpoint(original, shapes)
    models = folder / "models" / "diffusion_models"
    zm.convert(original, models / "z_image_turbo_bf16-mxfp8.safetensors")
    original.unlink()
    lora = {}
    for layer in range(LAYERS):
        name = f"diffusion_model.layers.{layer}.attention.out.lora_"
        lora[f"{name}A.weight"] = random(4, DIM, seed=layer) * 10
        lora[f"{name}B.weight"] = random(DIM, 4, seed=layer + 100) * 10
    save_file(lora, folder / "models" / "loras" / "style.safetensors")
    (folder / "input").mkdir()
    (folder / "input" / "example.png").write_bytes(image_file((96, 72)))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    checkout = os.environ.get("ZM_COMFYUI")
    if not checkout:
        pytest.skip("ZM_COMFYUI names no checkout of ComfyUI")
    folder = tmp_path_factory.mktemp("server")
    write_models(folder)
    small = folder / "custom_nodes" / "small"
    small.mkdir(parents=True)
    small.joinpath("__init__.py").write_text(
        "from helpers.comfyui_nodes import register\nNODE_CLASS_MAPPINGS = register()\n"
    )
    install = [sys.executable, "-m", "zimage_mxfp8", "comfyui", "install", str(folder)]
    subprocess.run(install, check=True, capture_output=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-c", PROGRAM, f"{checkout}/main.py", "--cpu", "--port", str(port)),
        *("--base-directory", str(folder), "--database-url", "sqlite:///:memory:"),
        *("--disable-api-nodes", "--fp32-unet"),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests" / "python")}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        for _ in range(600):
            assert process.poll() is None, (folder / "log").read_text("utf-8")[-2000:]
            with socket.socket() as attempt:
                if attempt.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield Server(f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait(30)


def error(found: dict[str, Any], wanted: dict[str, Any]) -> float:
    a, b = (torch.tensor(each["latents"]) for each in (found, wanted))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", ["text-to-image", "lora", "controlnet"])
def test_the_workflows(server: Server, name: str) -> None:
    """No call falls back, and the latents are those of the workflow without the node.

    There ComfyUI adds the LoRA to weights that it rounds to 8 bits again.
    """
    fast = server.drawn(name, fast=True)
    assert fast["native"] == [2] and fast["fallback"] == []
    stock = server.drawn(name, fast=False)
    assert stock["native"] == []
    assert error(fast, stock) < (0.1 if name == "lora" else 1e-3)
    if name != "text-to-image":  # the LoRA and the ControlNet count
        assert error(server.drawn("text-to-image", fast=True), stock) > 0.1


def test_unloading_between_two(server: Server) -> None:
    first = server.drawn("text-to-image", fast=True)
    server.free()
    again = server.draw("text-to-image", fast=True)
    assert again["native"] == [2] and again["fallback"] == []  # of a model that is loaded anew
    assert again["latents"] == first["latents"]
