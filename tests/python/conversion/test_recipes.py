"""Recipes as data: the built-in ones, and users' own files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import zimage_mxfp8 as zm
from helpers.commands import Run
from zimage_mxfp8.conversion.recipes import builtin_names

# The model card's table, layer by layer.
CARD_KEEPS = (
    ["layers.29.attention.qkv"]
    + [f"layers.{i}.adaLN_modulation.0" for i in range(22, 30)]
    + [f"context_refiner.{i}.attention.out" for i in (0, 1)]
    + ["context_refiner.1.feed_forward.w2"]
    + ["noise_refiner.1.attention.qkv", "noise_refiner.1.attention.out"]
    + ["noise_refiner.1.feed_forward.w2"]
    + [f"noise_refiner.{i}.feed_forward.w3" for i in (0, 1)]
)


def test_uniform_keeps_what_the_card_keeps(small_file: Path) -> None:
    plan = zm.plan_conversion(small_file)
    blocks = re.compile(r"^(layers|noise_refiner|context_refiner)\.")
    kept = {
        planned.layer
        for planned in plan.tensors.values()
        if planned.action == "keep"
        and blocks.match(planned.source.name)
        and len(planned.source.shape) == 2
    }
    assert kept == set(CARD_KEEPS)
    others = {p.layer for p in plan.quantized if not blocks.match(p.layer)}
    assert not others, "embedders and the final layer stay"


def test_every_rule_has_a_reason() -> None:
    for name in builtin_names():
        recipe = zm.load_recipe(name)
        assert recipe.title and recipe.description and recipe.keep
        assert all(rule.name and rule.reason for rule in recipe.keep)


def test_toml_file_extends_a_recipe(small_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        'title = "Mine"\nextends = "uniform"\n[[keep]]\nname = "first"\n'
        "pattern = '^layers\\.0\\.'\nreason = \"because\"\n"
    )
    plan = zm.plan_conversion(small_file, zm.ConversionOptions(recipe=file))
    assert len(plan.quantized) == 185 - 6
    assert plan.tensors["layers.0.attention.qkv.weight"].reason == "because"
    assert plan.recipe.title == "Mine"


def test_toml_file_alone(small_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("keep = []")
    plan = zm.plan_conversion(small_file, zm.ConversionOptions(recipe=file))
    assert len(plan.quantized) == 34 * 5 + 32 + 6, "every 2-D weight"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("title = ", "is not TOML"),
        ("keep = " + "[" * 3000 + "]" * 3000, "is not TOML"),
        ('[[keep]]\nname = "a"\npattern = "a{99999999999}"\nreason = "b"', "number 1: the pattern"),
        ('colour = "red"', 'the unknown key "colour"'),
        ("title = 3", '"title" must be a str'),
        ('extends = "theirs"', 'extends "theirs", which is not one of'),
        ("# nothing\n", "is empty; to keep no layer, write keep = []"),
        ('source_rounding = "float8"', '"source_rounding" must be'),
        ('[[keep]]\nname = "a"', "number 1 must have exactly"),
        ('[[keep]]\nname = "a"\npattern = "("\nreason = "b"', 'number 1: the pattern "("'),
        ('[[keep]]\nname = "a"\npattern = 3\nreason = "b"', "must be text"),
        ("keep = [1]", "number 1 must have exactly"),
    ],
)
def test_bad_recipe_files(
    in_process: Run, small_file: Path, tmp_path: Path, text: str, sentence: str
) -> None:
    (tmp_path / "bad.toml").write_text(text)
    result = in_process("convert", "-i", small_file, "-o", "o.safetensors", "--recipe", "bad.toml")
    assert result.returncode == 1
    assert result.stderr.startswith("zimage-mxfp8: error: recipe bad.toml")
    assert sentence in result.stderr
    assert not (tmp_path / "o.safetensors").exists()


def test_recipe_that_is_not_text(in_process: Run, small_file: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_bytes(b"\xff\xfe")
    result = in_process("convert", "-i", small_file, "--recipe", "bad.toml")
    assert result.returncode == 1 and "is not TOML" in result.stderr


def test_patterns_that_match_nothing_are_reported(in_process: Run, small_file: Path) -> None:
    result = in_process(
        *("convert", "-i", small_file, "-o", "o.safetensors"),
        *("--exclude-layers", "layers.99", "--exclude-layers", r"layers\.0\."),
    )
    assert result.returncode == 0
    assert result.stderr == 'zimage-mxfp8: warning: pattern "layers.99" matches no tensor\n'


def test_nothing_to_quantise_is_an_error(in_process: Run, small_file: Path, tmp_path: Path) -> None:
    result = in_process("convert", "-i", small_file, "-o", "o.safetensors", "--exclude-layers", ".")
    assert result.returncode == 1
    assert (
        "has nothing to quantise: every 2-D weight is kept; choose another --recipe, or "
        in result.stderr
    )
    assert not list(tmp_path.iterdir())


def test_recipes_command(in_process: Run, tmp_path: Path) -> None:
    text = in_process("recipes").stdout
    for name in builtin_names():
        assert name in text
    assert "uniform (the default)" in text
    assert r"^layers\.29\.attention\.qkv\." in text
    (tmp_path / "own.toml").write_text('title = "Own"')
    document = json.loads(in_process("recipes", "own.toml", "zimage", "--json").stdout)
    assert [recipe["name"] for recipe in document] == ["own.toml", "zimage"]
    assert document[1]["keep"]
