"""The README's examples, as they stand there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import zimage_mxfp8 as zm

README = (Path(__file__).parents[2] / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_example(small_file: Path, tmp_path: Path) -> None:
    shutil.copy(small_file, tmp_path / "in.safetensors")
    example, _ = blocks("python")
    result = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1].startswith("185 layers quantised, ")
    assert zm.validate(tmp_path / "out.safetensors", small_file).ok


def test_products_example() -> None:
    _, example = blocks("python")
    subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, check=True)


def test_drop_in_command(small_file: Path, tmp_path: Path) -> None:
    shutil.copy(small_file, tmp_path / "in.safetensors")
    (command,) = [block for block in blocks("sh") if "--zimage" in block]
    folder = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    result = subprocess.run(
        command,
        shell=True,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.startswith("out.safetensors: 161 layers in MXFP8")
    assert result.stderr == ""


def test_recipe_example(small_file: Path, tmp_path: Path) -> None:
    (recipe,) = blocks("toml")
    (tmp_path / "own.toml").write_text(recipe)
    plan = zm.plan_conversion(small_file, recipe=tmp_path / "own.toml")
    assert len(plan.quantized) == 185 - 6


def test_options_exist() -> None:
    command = [sys.executable, "-m", "zimage_mxfp8.cli.main", "convert", "--help"]
    help_text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    table = README[README.index("| option |") : README.index("The output appears whole")]
    options = set(re.findall(r"`(--?[a-z-]+)", table))
    assert len(options) > 10
    for option in options:
        assert option in help_text, option
