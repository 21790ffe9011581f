"""The guides: their commands and examples as they stand there, and what they say of options."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import zimage_mxfp8 as zm
from helpers.adapter_files import dotted, modules_of, write_pairs
from helpers.checkpoints import sha256
from helpers.control_reference import file_tensors, make_controlnet, write_controlnet
from helpers.diffusers_reference import make_reference
from helpers.documents import (
    GUIDE,
    PAGES,
    README,
    ROOT,
    block_with,
    blocks,
    command_lines,
    run_in_python,
    run_in_shell,
    text_of,
)
from helpers.images import init_image, settings_of
from helpers.serving import StubEngine, serving
from zimage_mxfp8.cli.command_line import build_parser
from zimage_mxfp8.generation.example_images import psnr
from zimage_mxfp8.generation.small_model import examples

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYTHON_BLOCKS = {
    "README.md": 1,
    "controlnet.md": 1,
    "diffusers.md": 2,
    "lora.md": 2,
    "other-servers.md": 1,  # by tests/python/programs/sglang_checkpoint.py
    "python.md": 3,
    "serving.md": 2,  # one is run by server/test_litellm.py
}  # which the tests run


def help_of(*command: str) -> str:
    program = [sys.executable, "-m", "zimage_mxfp8.cli.main", *command, "--help"]
    return subprocess.run(program, capture_output=True, text=True, check=True).stdout


def test_every_python_block_is_run_by_a_test() -> None:
    counts = {page.name: len(blocks(page, "python")) for page in PAGES}
    assert {name: count for name, count in counts.items() if count} == PYTHON_BLOCKS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_command_lines_have_options_that_exist(page: Path) -> None:
    for arguments in command_lines(page):
        build_parser().parse_args(arguments)


def test_commands_are_those_of_the_program() -> None:
    commands = re.findall(r"^    ([\w-]+)", help_of(), re.MULTILINE)
    shown = {arguments[0] for page in PAGES for arguments in command_lines(page)}
    assert {name for name in shown if not name.startswith("-")} == set(commands) - {"completion"}
    named = {
        name for page in PAGES for name in re.findall(r"zimage-mxfp8 ([a-z][a-z-]*)", text_of(page))
    }
    assert named >= set(commands)


def test_names_of_the_package_exist() -> None:
    names = {name for page in PAGES for name in re.findall(r"\bzm\.(\w+)", text_of(page))}
    assert len(names) >= 30 and [name for name in names if not hasattr(zm, name)] == []


def test_extras_exist() -> None:
    extras = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]["optional-dependencies"]
    named = {
        name
        for page in PAGES
        for names in re.findall(r'"(?:zimage-mxfp8|\.)\[([\w,]+)\]"', text_of(page))
        for name in names.split(",")
    }
    assert len(named) >= 5 and named <= set(extras)


@pytest.mark.parametrize(
    ("page", "command"),
    [
        ("convert.md", "convert"),
        ("generate.md", "generate"),
        ("compare.md", "compare"),
        ("evaluate.md", "evaluate"),
        ("serving.md", "serve"),
    ],
)
def test_options_of_the_tables_exist(page: str, command: str) -> None:
    table = text_of(GUIDE / page).partition("| option | effect |")[2].partition("\n\n")[0]
    options = set(re.findall(r"`(--?[a-z-]+)", table))
    assert len(options) >= 10
    help_text = help_of(command)
    for option in options:
        assert option in help_text, option


@pytest.mark.parametrize(
    ("page", "command"),
    [("generate.md", "generate"), ("compare.md", "compare"), ("serving.md", "serve")],
)
def test_every_option_is_in_the_guide(page: str, command: str) -> None:
    help_text, text = help_of(command), text_of(GUIDE / page)
    options = re.findall(r"^  (--?[\w-]+)", help_text, re.MULTILINE)
    assert len(options) > 10
    named = [name for name in options if re.search(rf"(?<![\w-]){name}(?![\w-])", text)]
    assert set(options) - set(named) == {"-h"}


def test_python_conversion(small_file: Path, tmp_path: Path) -> None:
    shutil.copy(small_file, tmp_path / "in.safetensors")
    printed = run_in_python(block_with(GUIDE / "python.md", "python", "zm.convert"), tmp_path)
    assert printed.splitlines()[-1].startswith("185 layers quantised, ")
    assert zm.validate(tmp_path / "out.safetensors", small_file).ok


def test_python_matrices(tmp_path: Path) -> None:
    run_in_python(block_with(GUIDE / "python.md", "python", "zm.gemm"), tmp_path)


def test_python_images(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # see `ExamplePainter.draw`
    try:
        printed = run_in_python(block_with(GUIDE / "python.md", "python", "zm.ZImageGen"), tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert printed.startswith("8 steps in mode ")
    _, (example, *_) = examples()
    with Image.open(tmp_path / "circle.png") as made, Image.open(example.image) as original:
        assert psnr(made, original) > 40  # diffusers, by the weights before they were quantised


def test_diffusers_image_to_image(turbo: Path) -> None:
    example = block_with(GUIDE / "diffusers.md", "python", "from_checkpoint")
    assert example.count("1024") == 2
    run_in_python(example.replace("1024", "64"), turbo)
    with Image.open(turbo / "night.png") as image:
        assert image.size == (64, 64)


def test_diffusers_quantizer(zimage_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(zimage_folder, tmp_path / "Z-Image-Turbo")
    example = block_with(GUIDE / "diffusers.md", "python", "ZImageMXFP8Config")
    assert example.count("1024") == 2
    run_in_python(example.replace("1024", "64"), tmp_path)
    assert zm.inspect(tmp_path / "Z-Image-Turbo-mxfp8").quantization == "MXFP8"
    with Image.open(tmp_path / "fox.png") as image:
        assert image.size == (64, 64)


def test_export(zimage_quantized: Path, tmp_path: Path) -> None:
    shutil.copy(zimage_quantized, tmp_path / "z_image_turbo-mxfp8.safetensors")
    (commands,) = blocks(GUIDE / "export.md", "sh")
    run_in_shell(commands, tmp_path)
    assert sha256(tmp_path / "again.safetensors") == sha256(zimage_quantized)
    rows = zm.inspect(tmp_path / "z_image_turbo-fp8.safetensors")
    assert rows.quantization == "FP8 with one scale per row"


def test_lora(turbo: Path) -> None:
    layers = {n: x for n, x in modules_of(make_reference()).items() if "attention" in n}
    dialect = dotted("transformer."), ".lora_A.weight", ".lora_B.weight"
    for name in ("style", "detail"):
        save_file(write_pairs(layers, *dialect).tensors, turbo / f"{name}.safetensors")
    on_its_own, in_pipelines = blocks(GUIDE / "lora.md", "python")
    small = in_pipelines.replace("guidance_scale", "height=64, width=64, guidance_scale")
    assert small != in_pipelines
    clean = "for name in list(model.loras): model.unload_lora(name)"
    block = "\n".join([on_its_own, clean, small, "print(image.size)"])
    assert run_in_python(block, turbo).splitlines()[-1] == "(64, 64)"


@pytest.mark.slow
def test_controlnet(turbo: Path) -> None:
    model = make_controlnet("1.0", (0, 1), refiners=1)
    name = "Z-Image-Turbo-Fun-Controlnet-Union.safetensors"
    write_controlnet(turbo / name, file_tensors("1.0", model), torch.bfloat16)
    init_image(turbo / "edges.png", (64, 64))
    page = GUIDE / "controlnet.md"
    (commands,), (example,) = blocks(page, "sh"), blocks(page, "python")
    run_in_shell(commands, turbo)
    assert settings_of(turbo / "fox.png")["controlnet"] == name.replace(".", "-mxfp8.")
    assert example.count("1024") == 2
    run_in_python(example.replace("1024", "64"), turbo)
    with Image.open(turbo / "fox.png") as image:
        assert image.size == (64, 64) and "zimage-mxfp8" not in image.info


def test_serving_client(tmp_path: Path) -> None:
    engine = StubEngine()
    example = block_with(GUIDE / "serving.md", "python", "import OpenAI")
    with serving(engine) as address:
        run = example.replace("http://127.0.0.1:8000", address)
        assert run != example
        printed = run_in_python(run, tmp_path).splitlines()
    assert printed == ["image_edit.partial_image"] * 2 + ["image_edit.completed"]
    drawn, edited = (request.settings for request in engine.drawn)
    assert drawn.seed == 1 and edited.strength == 0.7
    for name in ("fox", "night"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.size == engine.default_size


def test_generate_has_the_commands_of_the_readme() -> None:
    """Those that `test_readme.py` runs."""
    block = block_with(GUIDE / "generate.md", "sh", "zimage-mxfp8 generate")
    assert block == block_with(README, "sh", "zimage-mxfp8 generate")


def test_drop_in_command(small_file: Path, tmp_path: Path) -> None:
    shutil.copy(small_file, tmp_path / "in.safetensors")
    command = block_with(GUIDE / "convert-to-quant.md", "sh", "--zimage")
    result = run_in_shell(command, tmp_path)
    assert result.stdout.startswith("wrote out.safetensors: 161 layers in MXFP8")
    assert result.stderr == ""


def test_compare_command(small_file: Path, tmp_path: Path) -> None:
    shutil.copy(small_file, tmp_path / "z_image_turbo_bf16.safetensors")
    block = block_with(GUIDE / "compare.md", "sh", "--bound")
    run_in_shell(block[block.index("zimage-mxfp8 compare") :], tmp_path)
    assert (tmp_path / "layers.csv").is_file()
    zm.plan_conversion(
        tmp_path / "z_image_turbo_bf16.safetensors",
        zm.ConversionOptions(recipe=tmp_path / "own.toml"),
    )


def test_probe_commands(small_file: Path, tmp_path: Path) -> None:
    shutil.copy(small_file, tmp_path / "z_image_turbo_bf16.safetensors")
    block = block_with(GUIDE / "probe.md", "sh", "zimage-mxfp8 probe")
    run_in_shell(block[block.index("zimage-mxfp8 probe") :], tmp_path)
    assert (tmp_path / "p.csv").is_file() and (tmp_path / "probe.html").is_file()
    assert zm.validate(tmp_path / "z_image_turbo-probe.safetensors", small_file).ok


def test_recipe_example(small_file: Path, tmp_path: Path) -> None:
    (recipe,) = blocks(GUIDE / "recipes.md", "toml")
    (tmp_path / "own.toml").write_text(recipe)
    plan = zm.plan_conversion(small_file, zm.ConversionOptions(recipe=tmp_path / "own.toml"))
    assert len(plan.quantized) == 185 - 6
