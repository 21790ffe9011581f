"""Read MXFP8 files for ComfyUI by SGLang's loader with this package's functions, and compare.

`other_servers.py sglang` runs this in SGLang's environment. The loader finds names, quantisation
and tensors. They are not loaded, which takes a GPU, but compared with SGLang's model, and their
values with those of plain files.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torchvision_operators  # noqa: F401 - before SGLang
from comfy_kitchen.tensor import QuantizedTensor, TensorCoreMXFP8Layout
from safetensors.torch import save_file
from sglang.multimodal_gen.configs.models.dits.zimage import ZImageArchConfig, ZImageDitConfig
from sglang.multimodal_gen.runtime import distributed, server_args
from sglang.multimodal_gen.runtime.loader import comfyui_checkpoints as loader
from sglang.multimodal_gen.runtime.loader import utils

import zimage_mxfp8 as zm
from zimage_mxfp8.zimage.layers import zimage_shapes

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs/guide/other-servers.md"
WIDTH, LAYERS, CAPTION = 384, 2, 96
RECIPES = ("uniform", "zimage")  # w1 and w3 of mixed kind in the first
Tensors = dict[str, torch.Tensor]


class Arguments(SimpleNamespace):
    """SGLang's arguments: those that the loader needs, and none of the others."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def arguments() -> Arguments:
    heads = WIDTH // 128
    architecture = ZImageArchConfig(
        dim=WIDTH,
        num_layers=LAYERS,
        num_attention_heads=heads,
        n_kv_heads=heads,
        cap_feat_dim=CAPTION,
    )
    return Arguments(
        attention_backend="torch_sdpa",
        component_attention_backends={},
        component_precisions={},
        kv_gather_degree=1,
        model_paths={},
        pipeline_config=SimpleNamespace(
            dit_config=ZImageDitConfig(arch_config=architecture), dit_precision="bf16"
        ),
        should_start_component_on_cpu=lambda _: True,
        should_use_fsdp_for_component=lambda _: False,
    )


def start() -> None:
    """Make the groups of one process that SGLang's layers ask for."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", WORLD_SIZE="1", LOCAL_RANK="0"
    )
    server_args.set_global_server_args(arguments())
    distributed.maybe_init_distributed_environment_and_model_parallel(tp_size=1, sp_size=1)


def read(file: Path) -> Tensors:
    """Return the tensors for SGLang's model, checked against its names, shapes and dtypes."""
    found: Tensors = {}

    def compare(model_cls: Any, init_params: Any, weights_iterator: Any, **_: Any) -> Any:
        meta = torch.device("meta")
        model = utils.initialize_model(model_cls, init_params, torch.bfloat16, meta)
        wanted = model.state_dict()
        names = utils.get_param_names_mapping(model_cls.param_names_mapping, set(wanted))
        tensors, _ = utils.hf_to_custom_state_dict(
            weights_iterator, names, set(wanted), strict=True
        )
        assert tensors.keys() == wanted.keys(), sorted(tensors.keys() ^ wanted.keys())[:5]
        for name, tensor in tensors.items():
            assert tensor.shape == wanted[name].shape, name
            assert tensor.dtype == wanted[name].dtype, name
        found.update(tensors)
        return model

    pipeline = SimpleNamespace(
        pipeline_name="ZImagePipeline", model_path=str(file), get_module=lambda _: None
    )
    with mock.patch.object(loader.spec, "maybe_load_fsdp_model", compare):
        loader.load_comfyui_transformer(pipeline, arguments())
    return found


def register() -> None:
    """Run the example of the documentation, which puts the functions into SGLang's loader."""
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    sys.path.insert(0, str(ROOT / "integrations/sglang"))
    exec(example, {})


def decoded(tensors: Tensors) -> Tensors:
    """Decode the quantised weights with comfy-kitchen."""
    plain = {n: t for n, t in tensors.items() if not n.endswith(".weight_scale_inv")}
    for name, codes in plain.items():
        if codes.dtype == torch.float8_e4m3fn:
            scale = tensors[f"{name}_scale_inv"].view(torch.float8_e8m0fnu)
            params = TensorCoreMXFP8Layout.Params(
                scale=scale, orig_dtype=torch.bfloat16, orig_shape=tuple(codes.shape)
            )
            plain[name] = QuantizedTensor(codes, "TensorCoreMXFP8Layout", params).dequantize()
    return plain


def main(folder: Path) -> None:
    random = torch.Generator().manual_seed(0)
    # SGLang derives the width of the feed-forward in this way.
    shapes = zimage_shapes(dim=WIDTH, layers=LAYERS, caption_dim=CAPTION, hidden=WIDTH * 8 // 3)
    source = folder / "source.safetensors"
    save_file(
        {n: (torch.randn(s, generator=random) * 0.05).bfloat16() for n, s in shapes.items()}, source
    )
    start()
    plain = {}
    for recipe in RECIPES:
        zm.convert(source, folder / f"{recipe}.safetensors", recipe=recipe)
        zm.dequantize_checkpoint(folder / f"{recipe}.safetensors", folder / "plain.safetensors")
        plain[recipe] = read(folder / "plain.safetensors")
        (folder / "plain.safetensors").unlink()
    register()
    for recipe in RECIPES:
        tensors = read(folder / f"{recipe}.safetensors")
        modules = sum(name.endswith(".weight_scale_inv") for name in tensors)
        assert modules
        for name, values in decoded(tensors).items():
            assert torch.equal(values, plain[recipe][name]), name
        print(f"  a file of recipe {recipe}, {modules} modules in MXFP8: the same", flush=True)
    read(source)  # plain files still pass


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(name))
