"""The README's examples, as they stand there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import zimage_mxfp8 as zm
from helpers.images import STAGES

README = (Path(__file__).parents[3] / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_example(small_file: Path, tmp_path: Path) -> None:
    shutil.copy(small_file, tmp_path / "in.safetensors")
    example, *_ = blocks("python")
    result = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1].startswith("185 layers quantised, ")
    assert zm.validate(tmp_path / "out.safetensors", small_file).ok


def test_names_and_commands_are_there() -> None:
    names = set(re.findall(r"\bzm\.(\w+)", README))
    assert len(names) >= 15 and [name for name in names if not hasattr(zm, name)] == []
    program = [sys.executable, "-m", "zimage_mxfp8.cli.main", "--help"]
    help_text = subprocess.run(program, capture_output=True, text=True, check=True).stdout
    commands = re.findall(r"^    (\w+)", help_text, re.MULTILINE)
    assert set(re.findall(r"zimage-mxfp8 ([a-z]+)", README)) == set(commands)


def test_contents_and_links_lead_somewhere() -> None:
    headings = re.findall(r"^## (.*)", README, re.MULTILINE)
    contents = README[: README.index("## Start")]
    assert set(headings) <= set(re.findall(r"\[([^]]+)\]\(#", contents))
    everywhere = re.findall(r"^##+ (.*)", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", x).lower().replace(" ", "-") for x in everywhere}
    assert set(re.findall(r"\]\(#([^)]*)\)", README)) <= anchors


def test_products_example() -> None:
    (example,) = [block for block in blocks("python") if "zm.gemm" in block]
    subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, check=True)


def run_in_shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run commands as README has them, with this environment's programs."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )


def test_drop_in_command(small_file: Path, tmp_path: Path) -> None:
    shutil.copy(small_file, tmp_path / "in.safetensors")
    (command,) = [block for block in blocks("sh") if "--zimage" in block]
    result = run_in_shell(command, tmp_path)
    assert result.stdout.startswith("wrote out.safetensors: 161 layers in MXFP8")
    assert result.stderr == ""


@pytest.fixture
def turbo(zimage_folder: Path, zimage_quantized: Path, tmp_path: Path) -> Path:
    """A folder with the names of the examples, where the model's own transformer is missing."""
    ignored = shutil.ignore_patterns("transformer")
    shutil.copytree(zimage_folder, tmp_path / "Z-Image-Turbo", ignore=ignored)
    shutil.copy(zimage_quantized, tmp_path / "Z-Image-Turbo-mxfp8.safetensors")
    return tmp_path


def test_pipeline_example(turbo: Path) -> None:
    (example,) = [block for block in blocks("python") if "ZImagePipeline" in block]
    assert example.count("1024") == 2
    smaller = example.replace("1024", "64")
    # Commands that other tests run in this process may have made diffusers quiet.
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_VERBOSITY")}
    result = subprocess.run(
        [sys.executable, "-c", smaller],
        cwd=turbo,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    remarks = [x for x in result.stderr.splitlines() if x.strip() and "%|" not in x]
    assert len(remarks) == 1 and remarks[0].startswith("Expected types for transformer")
    with Image.open(turbo / "fox.png") as image:
        assert image.size == (64, 64)


def test_generate_commands(zimage_folder: Path, tmp_path: Path) -> None:
    """From a downloaded folder to an image."""
    shutil.copytree(zimage_folder, tmp_path / "Z-Image-Turbo")
    (block,) = [block for block in blocks("sh") if "zimage-mxfp8 generate" in block]
    command = block[block.index("zimage-mxfp8 convert") :].rstrip() + " --height 64 --width 64"
    result = run_in_shell(command, tmp_path)
    converted, drawn, total = result.stdout.splitlines()
    assert "Z-Image-Turbo-mxfp8.safetensors: " in converted
    assert drawn.startswith("fox.png: 64x64, seed ") and total.startswith("total: ")
    # The model is smaller than what the recipe is for.
    remarks = STAGES.sub("", result.stderr).splitlines()
    assert all(line.endswith("matches no tensor") for line in remarks)


def test_compare_command(small_file: Path, tmp_path: Path) -> None:
    shutil.copy(small_file, tmp_path / "z_image_turbo_bf16.safetensors")
    (block,) = [
        block for block in blocks("sh") if "zimage-mxfp8 compare" in block and "--bound" in block
    ]
    command = block[block.index("zimage-mxfp8 compare") :]
    run_in_shell(command, tmp_path)
    assert (tmp_path / "layers.csv").is_file()
    zm.plan_conversion(tmp_path / "z_image_turbo_bf16.safetensors", recipe=tmp_path / "own.toml")


def test_recipe_example(small_file: Path, tmp_path: Path) -> None:
    (recipe,) = blocks("toml")
    (tmp_path / "own.toml").write_text(recipe)
    plan = zm.plan_conversion(small_file, recipe=tmp_path / "own.toml")
    assert len(plan.quantized) == 185 - 6


@pytest.mark.parametrize(
    ("command", "end"),
    [
        ("convert", "The output appears whole"),
        ("generate", "An image that"),
        ("compare", "The squared error of weights does not"),
    ],
)
def test_options_exist(command: str, end: str) -> None:
    program = [sys.executable, "-m", "zimage_mxfp8.cli.main", command, "--help"]
    help_text = subprocess.run(program, capture_output=True, text=True, check=True).stdout
    before = README[: README.index(end)]
    options = set(re.findall(r"`(--?[a-z-]+)", before[before.rindex("| option |") :]))
    assert len(options) >= 10
    for option in options:
        assert option in help_text, option
