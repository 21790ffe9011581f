"""Forwards in ComfyUI on a CUDA device: its own, with this package's backend, and with the node.

Needs a checkout of ComfyUI and its packages. The checkpoint is synthetic, of the full size, and
needs 30 GB of disk; so are the LoRAs, on every linear of all blocks. ComfyUI loads models as a
whole (its dynamic VRAM is set up by its server, which does not run here) and adds LoRAs to the
weights beforehand, so that they cost its own forward nothing. The node is timed through the same
call of ComfyUI's model. `own` is our transformer without ComfyUI, with the same adapters.
All ways take turns. `error` is relative to ComfyUI's own forward, and with LoRAs, for which ComfyUI
quantises again, to `own`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from zimage_mxfp8.transformer.model import ZImageTransformer
from zimage_mxfp8.zimage.layers import zimage_shapes

from ..report import Report
from .additions import converted, in_turns, random_adapter
from .transformer import free

COLUMNS = {
    "mode": "of the node and of own",
    "image": "pixels of a side",
    "loras": "",
    "by": "",
    "ms": "ms, median",
    "to_own": "over own",
    "error": "relative",
}
_RANK = 32
_CAPTION_TOKENS = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--comfyui", type=Path, required=True, help="a checkout of ComfyUI")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "zimage-mxfp8")
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 1024, 1536, 2048])
    parser.add_argument("--loras", type=int, nargs="+", default=[0, 1, 3], help="how many")
    parser.add_argument("--modes", nargs="+", default=["fp8"])
    parser.add_argument("--repeats", type=int, default=10, help="timed forwards")


def _modules(checkout: Path) -> SimpleNamespace:
    sys.path.insert(0, str(checkout))
    import comfy.model_management
    import comfy.sd

    return SimpleNamespace(management=comfy.model_management, sd=comfy.sd)


class _Loaded:
    """A MODEL of ComfyUI on the device."""

    def __init__(self, comfy: SimpleNamespace, model: Any) -> None:
        comfy.management.load_models_gpu([model], force_patch_weights=True)
        self.model = model

    def __call__(self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            found: torch.Tensor = self.model.model.diffusion_model(
                x, t, context, context.shape[1], transformer_options={}
            )
        return found


@dataclass
class _Ways:
    """The same weights and LoRAs, in ComfyUI and without it."""

    stock: _Loaded
    node: _Loaded
    own: ZImageTransformer


def run(arguments: argparse.Namespace, report: Report) -> None:
    comfy = _modules(arguments.comfyui)
    from zimage_mxfp8.comfy import register_backend
    from zimage_mxfp8.comfy.nodes import speed_up

    arguments.folder.mkdir(parents=True, exist_ok=True)
    file = converted(arguments.folder, "mxfp8-30", zimage_shapes())
    register_backend()
    for mode in arguments.modes:
        for count in arguments.loras:
            comfy.management.unload_all_models()
            free()
            adapters = [random_adapter(_RANK, seed) for seed in range(count)]

            def load(adapters: list[dict[str, torch.Tensor]] = adapters) -> Any:
                model = comfy.sd.load_diffusion_model(str(file))
                for adapter in adapters:
                    model = comfy.sd.load_lora_for_models(model, None, dict(adapter), 1.0, 0)[0]
                return model

            own = ZImageTransformer.from_checkpoint(file, "cuda", mode)
            for i, adapter in enumerate(adapters):
                own.load_lora(adapter, f"adapter{i}")
            node = speed_up(load(), mode)
            ways = _Ways(_Loaded(comfy, load()), _Loaded(comfy, node), own)
            for side in arguments.sides:
                _measure(ways, side, arguments.repeats, report)
            forward = node.object_patches["diffusion_model._forward"]
            assert not forward.fallback_calls, forward.fallback_calls


def _measure(ways: _Ways, side: int, repeats: int, report: Report) -> None:
    from comfy_kitchen import registry

    from zimage_mxfp8.comfy.backend import NAME

    random = torch.Generator("cuda").manual_seed(side)
    shapes = (1, 16, side // 8, side // 8), (1, _CAPTION_TOKENS, 2560)
    x, context = (torch.randn(s, generator=random, device="cuda").bfloat16() for s in shapes)
    t = torch.tensor([0.4], device="cuda")

    def with_backend(enabled: bool, model: _Loaded) -> Callable[[int], torch.Tensor]:
        def call(_: int) -> torch.Tensor:
            (registry.enable if enabled else registry.disable)(NAME)
            return model(x, t, context)

        return call

    def without_comfyui(_: int) -> torch.Tensor:
        sample = ways.own([x[0, :, None]], 1 - t, [context[0]], return_dict=False)[0]
        return -sample[0][None, :, 0]

    calls = {
        "ComfyUI": with_backend(False, ways.stock),
        "ComfyUI with the backend": with_backend(True, ways.stock),
        "the node": with_backend(True, ways.node),
        "own": without_comfyui,
    }
    outputs = {by: call(0).float() for by, call in calls.items()}
    assert torch.equal(outputs["the node"], outputs["own"])
    wanted = outputs["own" if ways.own.loras else "ComfyUI"]
    ms = in_turns(calls, repeats, lambda _: None)
    for by, each in ms.items():
        report.add(
            mode=ways.own.compute,
            image=side,
            loras=len(ways.own.loras),
            by=by,
            ms=each,
            to_own=each / ms["own"],
            error=float((outputs[by] - wanted).norm() / wanted.norm()),
        )
