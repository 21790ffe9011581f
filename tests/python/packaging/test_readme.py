"""The README: its examples as they stand there, its figures and its links."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

import zimage_mxfp8 as zm
from helpers.documents import README, ROOT, block_with, blocks, run_in_shell, text_of
from helpers.images import STAGES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def test_setup_commands_are_alone_in_their_blocks() -> None:
    """`.ci/run` runs them."""
    first, second, *_ = blocks(README, "sh")
    assert first == "pip install . && zimage-mxfp8 demo\n"
    assert (
        second
        == 'pip install -c tests/constraints.txt ".[test]" && pytest -n auto --dist loadfile\n'
    )


def test_comfyui_quick_start(small_file: Path, tmp_path: Path) -> None:
    shutil.copy(small_file, tmp_path / "z_image_turbo_bf16.safetensors")
    folder = tmp_path / "ComfyUI/models/diffusion_models"
    folder.mkdir(parents=True)
    run_in_shell(block_with(README, "sh", "ComfyUI"), tmp_path)
    assert zm.validate(folder / "z_image_turbo_bf16-mxfp8.safetensors", small_file).ok


@pytest.mark.slow
def test_diffusers_quick_start(turbo: Path) -> None:
    (example,) = blocks(README, "python")
    assert example.count("1024") == 2
    (turbo / "example.py").write_text(example.replace("1024", "64"))
    result = run_in_shell("python example.py", turbo)  # with all that diffusers says
    remarks = [x for x in result.stderr.splitlines() if x.strip() and "%|" not in x]
    assert len(remarks) == 1 and remarks[0].startswith("Expected types for transformer")
    with Image.open(turbo / "fox.png") as image:
        assert image.size == (64, 64)


@pytest.mark.slow
def test_command_line_quick_start(zimage_folder: Path, tmp_path: Path) -> None:
    """From a downloaded folder to an image."""
    shutil.copytree(zimage_folder, tmp_path / "Z-Image-Turbo")
    block = block_with(README, "sh", "zimage-mxfp8 generate")
    command = block[block.index("zimage-mxfp8 convert") :].rstrip() + " --height 64 --width 64"
    result = run_in_shell(command, tmp_path)
    converted, drawn, total = result.stdout.splitlines()
    assert "Z-Image-Turbo-mxfp8.safetensors: " in converted
    assert drawn.startswith("fox.png: 64x64, seed ") and total.startswith("total: ")
    # The model is smaller than what the recipe is for.
    remarks = STAGES.sub("", result.stderr).splitlines()
    assert all(line.endswith("matches no tensor") for line in remarks)


def test_results_are_those_of_the_performance_page() -> None:
    results = text_of(README).partition("\n## Results\n")[2].partition("\nConditions and")[0]
    rows = re.findall(r"^\| (.*) \|$", results, re.MULTILINE)
    figures = {
        figure
        for row in rows
        for cell in row.split(" | ")[1:]
        for figure in re.findall(r"\d[\d.]*\d", cell)
    }
    measured = set(re.findall(r"\d[\d.]*\d", text_of(ROOT / "docs/performance.md")))
    assert len(figures) >= 15
    assert figures - {"1.3.4"} <= measured


def test_links_of_the_package_page_lead_to_the_repository() -> None:
    project = tomllib.loads(text_of(ROOT / "pyproject.toml"))
    page = text_of(README)
    for rule in project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        page = re.sub(rule["pattern"], rule["replacement"], page)
    images = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", page)
    links = re.findall(r"\]\(([^)]*)\)", page)
    assert len(links) >= 30 and all(link.startswith("https://") for link in links)
    assert len(images) == 2
    assert all(image.startswith("https://raw.githubusercontent.com/") for image in images)
