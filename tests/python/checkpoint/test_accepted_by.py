"""What `inspect` says of a file's uses, held against the commands and calls themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import zimage_mxfp8 as zm
from helpers.checkpoints import random_tensors
from helpers.control_reference import file_tensors, make_controlnet
from zimage_mxfp8.cli.main import main
from zimage_mxfp8.transformer.model_file import open_model
from zimage_mxfp8.zimage.layers import zimage_shapes

FILES = (
    "plain", "mxfp8", "folder", "int8", "rowwise", "scaled", "control", "control-mxfp8", "flux",
    "flux-mxfp8", "vae",
)  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of each kind, by its name."""
    folder = tmp_path_factory.mktemp("accepted")
    found = {name: folder / f"{name}.safetensors" for name in (*FILES, "lora")}
    save_file(random_tensors(zimage_shapes(dim=128, layers=1, hidden=341)), found["plain"])
    zm.convert(found["plain"], found["mxfp8"])
    zm.convert(found["plain"], found["int8"], format="int8-convrot")
    found["folder"] = folder / "folder"
    zm.export(found["mxfp8"], found["folder"], "diffusers")
    zm.export(found["mxfp8"], found["rowwise"], "fp8-rowwise")
    scaled = load_file(found["plain"])
    for name in [name for name in scaled if scaled[name].dim() == 2 and name.endswith(".weight")]:
        scaled[name] = scaled[name].to(torch.float8_e4m3fn)
        scaled[name.replace(".weight", ".scale_weight")] = torch.ones(1)
    save_file(scaled, found["scaled"])
    net = file_tensors("2.1", make_controlnet("2.1", range(1), 128))
    save_file({name: x.bfloat16() for name, x in net.items()}, found["control"])
    zm.convert(found["control"], found["control-mxfp8"])
    matrix = torch.randn(64, 64).bfloat16()
    save_file({"double_blocks.0.img_attn.qkv.weight": matrix}, found["flux"])
    zm.convert(found["flux"], found["flux-mxfp8"], any_model=True)
    save_file({"decoder.conv_in.weight": matrix}, found["vae"])
    out = "diffusion_model.layers.0.attention.out.lora_"
    save_file(
        {f"{out}A.weight": torch.randn(4, 128), f"{out}B.weight": torch.randn(128, 4)},
        found["lora"],
    )
    return found


@pytest.fixture
def uses(files: dict[str, Path], tmp_path: Path) -> dict[str, Callable[[Path], object]]:
    """What a user runs, by the words of `inspect`."""

    def command(*words: object) -> Callable[[Path], object]:
        def run(file: Path) -> None:
            names = {"FILE": file, "LORA": files["lora"], "OUT": tmp_path / "out.safetensors"}
            assert main([str(names.get(str(word), word)) for word in words]) == 0

        return run

    return {
        "convert": command("convert", "FILE", "--dry-run"),
        "convert (any model)": command("convert", "FILE", "--dry-run", "--any-model"),
        "validate (as the original)": lambda file: zm.validate(files["mxfp8"], file),
        "merge-lora": command("merge-lora", "FILE", "OUT", "--lora", "LORA"),
        "probe": command("probe", "FILE"),
        "compare": command("compare", "FILE", "--low-rank", "none"),
        "compare (any model)": command("compare", "FILE", "--low-rank", "none", "--any-model"),
        "validate": command("validate", "FILE"),
        "dequantize": command("dequantize", "FILE", "-o", "OUT"),
        "export": lambda file: zm.export(
            file, tmp_path / "out", "comfyui" if file.is_dir() else "diffusers"
        ),
        "sensitivity": lambda file: open_model(file, "measure"),
        "ZImageTransformer": lambda file: zm.ZImageTransformer.from_checkpoint(file, "cpu"),
        "ZImageControlNet": lambda file: zm.ZImageControlNet.from_checkpoint(file, "cpu"),
    }


@pytest.mark.parametrize("name", FILES)
def test_commands_take_what_inspect_says(
    name: str, files: dict[str, Path], uses: dict[str, Callable[[Path], object]]
) -> None:
    found = zm.inspect(files[name])
    said = {word for commands in found.accepted_by for word in commands.split(", ")}
    for use, run in uses.items():
        try:
            run(files[name])
        except (AssertionError, zm.Error):
            is_taken = False
        else:
            is_taken = True
        assert is_taken == bool({use, use.removesuffix(" (any model)")} & said), use
    assert bool(found.refusal) == (not found.accepted_by)


@pytest.mark.parametrize("name", ["mxfp8", "folder", "int8", "rowwise", "scaled"])
def test_scales_are_no_parameters(name: str, files: dict[str, Path]) -> None:
    wanted = sum(tensor.numel() for tensor in load_file(files["plain"]).values())
    assert zm.inspect(files["plain"]).parameters == wanted
    assert zm.inspect(files[name]).parameters == wanted
