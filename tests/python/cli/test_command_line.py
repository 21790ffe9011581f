"""What a user types: files by position, what is given twice, what is misspelt, what was written."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import zimage_mxfp8 as zm
from helpers.checkpoints import (
    PREFIX,
    random_tensors,
    sha256,
    small_shapes,
    to_diffusers,
    write_shards,
)
from helpers.commands import Run, fails, only
from helpers.interruption import interrupted
from helpers.interruption import run as run_program
from helpers.terminal import run_in_terminal, tables_in_terminal
from zimage_mxfp8.checkpoint.output import AtomicFile
from zimage_mxfp8.cli.command_line import build_parser
from zimage_mxfp8.cli.main import main
from zimage_mxfp8.generation.example_images import ExamplePainter
from zimage_mxfp8.generation.small_model import examples
from zimage_mxfp8.transformer.compute import COMPUTE_MODES
from zimage_mxfp8.zimage.layers import zimage_shapes


@pytest.fixture
def here(small_file: Path, tmp_path: Path) -> Path:
    os.link(small_file, tmp_path / "in.safetensors")
    return tmp_path


# ---- files by position and by option


@pytest.mark.parametrize(
    "words",
    [
        "in.safetensors",
        "in.safetensors in-mxfp8.safetensors",
        "in.safetensors --threads 1 in-mxfp8.safetensors",
        "--recipe uniform in.safetensors -o in-mxfp8.safetensors",
        "-i in.safetensors -o in-mxfp8.safetensors",
        "--input in.safetensors",
        "./in.safetensors",
    ],
)
def test_convert_takes_files_either_way(
    in_process: Run,
    here: Path,
    small_file: Path,
    words: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    result = in_process("convert", *words.split())
    assert (result.returncode, result.stderr) == (0, "")
    made = next(here.glob("*-mxfp8.safetensors"))
    assert result.stdout.startswith("wrote in-mxfp8.safetensors: 185 layers in MXFP8, ")
    zm.convert(small_file, expected := tmp_path_factory.mktemp("e") / "e.safetensors")
    assert sha256(made) == sha256(expected)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("", "name the checkpoint to convert: zimage-mxfp8 convert FILE [OUT]"),
        ("-o o.safetensors", "name the checkpoint to convert"),
        ("in.safetensors -i in.safetensors", "the input is given twice"),
        (
            "-i in.safetensors o.safetensors",
            "-i in.safetensors; give it once (-o names the output)",
        ),
        ("in.safetensors a.safetensors -o b.safetensors", "as -o b.safetensors; give it once"),
        ("in.safetensors a.safetensors b.safetensors", "unrecognized arguments: b.safetensors"),
        ("in.safetensors o.gguf", "argument OUT: o.gguf does not end in .safetensors"),
        ("in.safetensors -o o", "argument -o/--output: o does not end in .safetensors"),
        ("in.safetensors .", "argument OUT: . is a folder; name a file"),
        ("in.safetensors --tensors", "--tensors belongs to --dry-run"),
    ],
)
def test_files_that_convert_refuses(in_process: Run, here: Path, words: str, sentence: str) -> None:
    result = in_process("convert", *words.split())
    fails(result, 2, sentence)
    assert len(result.stderr.splitlines()) == 1
    only(here, "in.safetensors")


def test_dequantize_refuses_other_suffixes(in_process: Run, here: Path) -> None:
    for name in ("o", "o.gguf", "o.safetensors.bak"):
        fails(
            in_process("dequantize", "in.safetensors", "-o", name),
            2,
            f"{name} does not end in .safet",
        )
    only(here, "in.safetensors")


PARSERS: dict[str, argparse.ArgumentParser] = next(
    action.choices
    for action in build_parser()._actions
    if isinstance(action, argparse._SubParsersAction)
)


def single_valued_options() -> Iterator[tuple[str, str, str]]:
    """Command, option and a value that the option takes."""
    for command, parser in PARSERS.items():
        for action in parser._actions:
            if type(action) is not argparse._StoreAction or not action.option_strings:
                continue
            values = ("1", "64", "1024", "a.safetensors", "cpu")
            for value in action.choices or values:
                try:
                    (action.type or str)(value)  # type: ignore[operator]
                except (argparse.ArgumentTypeError, ValueError):
                    continue
                yield command, action.option_strings[0], str(value)
                break
            else:
                raise AssertionError(f"no value for {command} {action.option_strings}")


OPTIONS = list(single_valued_options())


def test_options_are_found() -> None:
    assert {("convert", "-i"), ("compare", "--bound"), ("generate", "--steps")} <= {
        (command, option) for command, option, _ in OPTIONS
    }
    assert not {("convert", "--exclude-layers"), ("sensitivity", "--prompt")} & {
        (command, option) for command, option, _ in OPTIONS
    }


def test_an_option_given_twice_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for command, option, value in OPTIONS:
        assert main([command, option, value, option, value]) == 2
        error = capsys.readouterr().err
        assert re.search(rf"argument {option}[/:].*given twice; give it once", error), error
        assert error.count("\n") == 1
        assert f"(see zimage-mxfp8 {command} --help)" in error


def test_both_spellings_are_one_option(in_process: Run, here: Path) -> None:
    result = in_process(
        "convert", "in.safetensors", "--bias-correction", "none", "--bias_correction=none"
    )
    fails(result, 2, "argument --bias-correction: given twice")
    only(here, "in.safetensors")


# ---- what is misspelt


@pytest.mark.parametrize(
    ("words", "end"),
    [
        ("convrt in", "demo, completion); did you mean convert? (see zimage-mxfp8 --help)"),
        ("xyz", "demo, completion) (see zimage-mxfp8 --help)"),
        ("convert in --recip zimage", "--recip; did you mean --recipe? (see zimage-mxfp8 convert"),
        ("convert in --recip=zimage", "; did you mean --recipe? ("),
        ("compare in --write_recip r", "; did you mean --write-recipe? ("),
        ("generate --model_dir m --size 64", "--size; did you mean --width --height? ("),
        ("sensitivity in --sze 64", "--sze; did you mean --size? ("),
        ("serve --model m", "--model; did you mean --model-dir? ("),
        ("generate --num_inference_steps 9", "; did you mean --steps? ("),
        ("generate --guidance-scale=3", "; did you mean --guidance? ("),
        ("generate --prompt a", "the following arguments are required: --model-dir ("),
        ("comfyui", "the following arguments are required: install, DIR ("),
        ("completion", "the following arguments are required: bash|zsh|fish ("),
        ("probe in --jsn --theads 1", "--jsn --theads; did you mean --json --threads? ("),
        ("probe in --qqqq", "unrecognized arguments: --qqqq (see"),
        ("compare in --low-rank grups", "(choose from groups, all, none); did you mean groups? ("),
        ("compare in --low-rank qqqq", "(choose from groups, all, none) (see"),
        ("convert in --bias-correction timestep", "; did you mean timesteps? ("),
        ("completion bsh", "(choose from bash, zsh, fish); did you mean bash? ("),
        ("recipes zimge", "zimage, zimage-refiner or a TOML file; did you mean zimage?"),
        ("convert in --recipe unifrom", "or a TOML file; did you mean uniform?"),
        ("recipes qqqq", "zimage, zimage-refiner or a TOML file\n"),
    ],
)
def test_did_you_mean(in_process: Run, tmp_path: Path, words: str, end: str) -> None:
    result = in_process(*words.split())
    fails(result, 2)
    assert end in result.stderr and len(result.stderr.splitlines()) == 1
    only(tmp_path)


def test_options_of_convert_to_quant_are_not_proposed(in_process: Run) -> None:
    """A suggestion must not be an option that is refused."""
    assert "did you mean" not in in_process("convert", "in", "--scale-optimizatio").stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            "generate --model-dir m --prompt a red fox",
            '--prompt takes one text, and "red" follows it; put the whole text in quotes',
        ),
        (
            "generate --model-dir m a red fox --seed 1",
            'unrecognized arguments: a red fox; did you mean --prompt "a red fox"?',
        ),
        (
            "sensitivity in --prompt a red fox",
            '--prompt takes one text, and "red" follows it; put the whole text in quotes',
        ),
        (
            "generate --model-dir m --seed 1 2",
            'unrecognized arguments: 2; did you mean --prompt "2"?',
        ),
    ],
)
def test_a_text_without_quotes(in_process: Run, words: str, sentence: str) -> None:
    result = in_process(*words.split())
    fails(result, 2, f"error: {sentence} (see zimage-mxfp8 {words.split()[0]} --help)")


ADDRESS = "https://example.com/a/model.safetensors"


@pytest.mark.parametrize(
    "words",
    [
        f"convert {ADDRESS}",
        f"convert in.safetensors {ADDRESS}",
        f"convert in.safetensors --lora {ADDRESS}:0.5",
        f"inspect {ADDRESS}",
        f"probe in.safetensors --csv {ADDRESS}",
        f"generate --model-dir {ADDRESS} --prompt a",
        f"generate --model-dir m --prompt a --init-image {ADDRESS}",
    ],
)
def test_web_addresses_are_no_paths(in_process: Run, here: Path, words: str) -> None:
    result = in_process(*words.split())
    assert result.returncode in (1, 2) and f"{ADDRESS}" in result.stderr
    assert "is a web address; " in result.stderr
    is_output = words.startswith(("convert in.safetensors https", "probe"))
    assert ("; name a file on this machine" in result.stderr) == is_output
    only(here, "in.safetensors")


@pytest.mark.parametrize("command", sorted({*PARSERS} - {"comfyui", "completion", "doctor"}))
def test_nul_bytes_in_names(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Only programs that call `main` can pass them."""
    parser, words = PARSERS[command], [command]
    for action in parser._actions:
        if action.required or (not action.option_strings and action.nargs == "*"):
            words += [
                *action.option_strings[:1],
                "comfyui" if action.choices else "a\0b.safetensors",
            ]
    if len(words) == 1:
        words += ["--model-dir" if command == "serve" else "-o", "a\0b"]
    if command == "generate":
        words += ["--prompt", "a"]
    assert main(words) in (1, 2)
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("zimage-mxfp8: error: ") and "\0" not in line, line


def test_a_folder_as_the_output(in_process: Run, here: Path) -> None:
    (here / "out").mkdir()
    for words in (
        "convert in.safetensors out",
        "dequantize in.safetensors -o out",
        "generate --model-dir m --prompt a -o out",
        "compare in.safetensors --html out",
    ):
        fails(in_process(*words.split()), 2, "out is a folder; name a file")


def test_a_recipe_that_extends_a_misspelt_one(in_process: Run, tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text('extends = "uniforn"')
    fails(in_process("recipes", "own.toml"), 1, 'extends "uniforn"', "did you mean uniform?")


# ---- python -m zimage_mxfp8


def test_the_module_is_the_program(tmp_path: Path) -> None:
    program = shutil.which("zimage-mxfp8", path=str(Path(sys.executable).parent))
    assert program is not None
    for words in (["--help"], ["recipes", "--help"], ["recipes"], ["convrt"], ["inspect", "none"]):
        results = [
            subprocess.run([*command, *words], cwd=tmp_path, capture_output=True, text=True)
            for command in ([program], [sys.executable, "-m", "zimage_mxfp8"])
        ]
        found = [(result.returncode, result.stdout, result.stderr) for result in results]
        assert found[0] == found[1]


def test_ctrl_c_in_the_module(tmp_path: Path) -> None:
    program = """
on_import("zimage_mxfp8.cli.display", press)
sys.argv[1:] = ["recipes"]
runpy.run_module("zimage_mxfp8", run_name="__main__")
"""
    interrupted(run_program(program, tmp_path))


# ---- "." as a path


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A diffusers folder, in which the commands run."""
    folder = tmp_path / "Z-Image-small"
    write_shards(folder, to_diffusers(random_tensors(small_shapes(1))))
    return folder


@pytest.mark.parametrize("path", [".", "../Z-Image-small", "transformer/.."])
def test_a_folder_by_its_path_alone(in_process: Run, model_folder: Path, path: str) -> None:
    (model_folder / "transformer").mkdir()
    made = model_folder.parent / "Z-Image-small-mxfp8.safetensors"
    result = in_process("convert", path, cwd=model_folder)
    assert result.returncode == 0, result.stderr
    assert made.is_file() and "Z-Image-small-mxfp8.safetensors: " in result.stdout
    for words in (["inspect"], ["compare", "--low-rank", "none"], ["convert", "--dry-run"]):
        result = in_process(words[0], path, *words[1:], cwd=model_folder)
        assert result.returncode == 0, result.stderr
    result = in_process(
        "probe", path, "--write-recipe", "../r.toml", "--html", "../p.html", cwd=model_folder
    )
    assert result.returncode == 0, result.stderr
    assert "Z-Image-small" in (model_folder.parent / "r.toml").read_text()
    assert (
        "<title>Weights of Z-Image-small that stand out<"
        in (model_folder.parent / "p.html").read_text()
    )
    commands = [line for line in result.stdout.splitlines() if line.startswith("zimage-mxfp8")]
    assert len(commands) == 2
    for command, name in zip(commands, ("excluded", "r"), strict=True):
        done = in_process(*shlex.split(command)[1:], cwd=model_folder)
        assert done.returncode == 0, done.stderr
        assert (model_folder.parent / f"Z-Image-small-{name}.safetensors").is_file()


def test_quantised_weights_in_this_folder(
    in_process: Run, small_file: Path, tmp_path: Path
) -> None:
    """A folder with one file of the name that diffusers gives it."""
    folder = tmp_path / "quantised"
    folder.mkdir()
    zm.convert(small_file, folder / "made.safetensors")
    (folder / "made.safetensors").rename(folder / "diffusion_pytorch_model.safetensors")
    result = in_process("validate", ".", cwd=folder)
    assert result.returncode == 0 and result.stdout.startswith(".: sound, 185 MXFP8 layers")
    result = in_process("dequantize", ".", "-o", "../plain.safetensors", cwd=folder)
    assert result.returncode == 0 and (tmp_path / "plain.safetensors").is_file()


def test_sensitivity_of_this_folder(in_process: Run, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    shapes = zimage_shapes(dim=128, layers=1, refiner_layers=1, caption_dim=64, hidden=18)
    write_shards(folder, to_diffusers(random_tensors(shapes)))
    outputs = ("--write-recipe", "../s.toml", "--html", "../s.html", "--state", "../s.json")
    options = ("--size", 32, "--timesteps", 1, "--device", "cpu", "--bound", 0.02)
    result = in_process("sensitivity", ".", *options, *outputs, cwd=folder)
    assert result.returncode == 0, result.stderr
    (command,) = (x for x in result.stdout.splitlines() if x.startswith("zimage-mxfp8 convert"))
    assert shlex.split(command)[-1] == str(tmp_path / "tiny-s.safetensors")
    assert "<title>Sensitivity of tiny, measured<" in (tmp_path / "s.html").read_text()


def test_the_root_has_no_name(in_process: Run) -> None:
    fails(in_process("convert", "/"), 2, "--output must be given")
    fails(in_process("convert", ".", cwd="/"), 2, "--output must be given")


# ---- what was written


def written(text: str) -> list[str]:
    """The files that a command says it wrote."""
    return re.findall(r"^(?:zimage-mxfp8: )?wrote (\S+): \S.*$", text, re.MULTILINE)


COMMANDS = [
    ("convert in.safetensors o.safetensors --report r.json", ["o.safetensors", "r.json"]),
    (
        "probe in.safetensors --csv p.csv --write-recipe p.toml --html p.html",
        ["p.csv", "p.toml", "p.html"],
    ),
    (
        "compare in.safetensors --low-rank none --csv c.csv --html c.html --write-recipe c.toml",
        ["c.csv", "c.html", "c.toml"],
    ),
    (
        "sensitivity tiny.safetensors --size 32 --timesteps 1 --device cpu --write-recipe s.toml "
        "--html s.html --state s.json",
        ["s.toml", "s.html", "s.json"],
    ),
]


@pytest.fixture
def tiny_here(here: Path) -> Path:
    shapes = zimage_shapes(dim=128, layers=1, refiner_layers=1, caption_dim=64, hidden=18)
    save_file(random_tensors(shapes), here / "tiny.safetensors")
    return here


@pytest.mark.parametrize(("command", "files"), COMMANDS)
def test_every_file_is_named(
    in_process: Run, tiny_here: Path, command: str, files: list[str]
) -> None:
    result = in_process(*command.split())
    assert result.returncode == 0, result.stderr
    assert written(result.stdout) == files and written(result.stderr) == []
    assert all((tiny_here / file).stat().st_size for file in files)


@pytest.mark.parametrize(("command", "files"), COMMANDS)
def test_json_stays_json(in_process: Run, tiny_here: Path, command: str, files: list[str]) -> None:
    result = in_process(*command.split(), "--json")
    assert result.returncode == 0, result.stderr
    json.loads(result.stdout)
    assert written(result.stderr) == files


def test_dequantize_names_its_file(in_process: Run, here: Path) -> None:
    assert in_process("convert", "in.safetensors", "q.safetensors").returncode == 0
    result = in_process("dequantize", "q.safetensors", "-o", "o.safetensors")
    assert written(result.stdout) == ["o.safetensors"] and result.stdout.count("\n") == 1


def test_nothing_is_named_that_was_not_written(in_process: Run, here: Path) -> None:
    (here / "old.csv").write_text("old")
    for command in ("probe", "compare"):
        result = in_process(command, "in.safetensors", "--csv", "old.csv")
        fails(result, 1, "old.csv exists")
    assert written(in_process("convert", "in.safetensors", "--dry-run").stdout) == []


# ---- demo

AFTER_DEMO = ("convert", "probe", "inspect")


@pytest.fixture
def _quick_painter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The originals in place of what the modes draw; test_commands.py has the demo itself."""

    def draw(painter: Any, compute: str) -> list[Image.Image]:
        assert compute in COMPUTE_MODES
        return [Image.open(example.image) for example in examples()[1]]

    monkeypatch.setattr(ExamplePainter, "__init__", lambda *_: None)
    monkeypatch.setattr(ExamplePainter, "draw", draw)


@pytest.mark.usefixtures("_quick_painter")
def test_demo_proposes_commands_that_run(in_process: Run, tmp_path: Path) -> None:
    result = in_process("demo", "-o", "my demo")
    assert result.returncode == 0, result.stderr
    *_, last = result.stdout.partition("To try next:\n")
    commands = last.splitlines()
    assert [shlex.split(command)[1] for command in commands] == [*AFTER_DEMO, "generate"]
    for command in commands:
        faster = ["--steps", "1", "-o", "o.png"] if " generate " in command else []
        done = in_process(*shlex.split(command)[1:], *faster)
        assert done.returncode == 0, (command, done.stderr)
    side, _ = examples()
    with Image.open(tmp_path / "o.png") as image:
        assert image.size == (side, side)
    folder = tmp_path / "my demo"
    names = ("z-image-demo-mxfp8.safetensors", "z-image-demo.png", "z-image-demo.safetensors")
    only(folder, *names)
    for name in names:
        assert f"wrote my demo/{name}: " in result.stdout
    with Image.open(folder / "z-image-demo.png") as sheet:  # five columns
        assert sheet.format == "PNG" and sheet.width >= 5 * (side + 8) + 8
        below = np.asarray(sheet.convert("L"))[26 + side : 26 + side + 18]
    # The PSNR is below each image but the original's.
    dark = [(part < 128).any() for part in np.array_split(below[:, 8:], 5, axis=1)]
    assert dark == [False, True, True, True, True]
    for path in folder.iterdir():
        path.unlink()
    for name in names:
        (folder / name).write_bytes(b"mine")
        fails(
            in_process("demo", "-o", "my demo"),
            1,
            f"my demo/{name} exists; --overwrite replaces it",
        )
        assert (folder / name).read_bytes() == b"mine"
        only(folder, name)
        if name != names[-1]:
            (folder / name).unlink()
    assert in_process("demo", "-o", "my demo", "--overwrite").returncode == 0
    assert min(path.stat().st_size for path in folder.iterdir()) > 1000


@pytest.mark.usefixtures("_quick_painter")
def test_demo_without_a_folder_proposes_commands_for_ones_own_file(in_process: Run) -> None:
    result = in_process("demo")
    *_, last = result.stdout.partition("To try next:\n")
    assert [line.split()[1] for line in last.splitlines()] == [*AFTER_DEMO, "generate"]
    assert "your.safetensors" in last


# ---- dry runs and recipes


@pytest.fixture
def all_in_one(tmp_path: Path) -> Path:
    """With names as long as those of real text encoders."""
    tensors = {PREFIX + n: t for n, t in random_tensors(small_shapes()).items()}
    encoder = "text_encoders.qwen3_4b.transformer.model.layers.{}.post_attention_layernorm.weight"
    tensors |= {encoder.format(i): torch.ones(4) for i in range(10)}
    save_file(tensors, tmp_path / "all.safetensors")
    return tmp_path / "all.safetensors"


def test_a_dry_run_is_short(all_in_one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(all_in_one.parent)
    plan = zm.plan_conversion(all_in_one)
    (groups, reasons), text = tables_in_terminal(["convert", all_in_one.name, "--dry-run"], 80)
    by_group = {row[0]: row[1:] for row in groups[1:]}
    assert by_group.keys() == {planned.group for planned in plan.tensors.values()}
    assert sum(int(row[0]) for row in by_group.values()) == len(plan.quantized)
    assert sum(int(row[1]) for row in by_group.values()) == len(plan.tensors) - len(plan.quantized)
    kept = [planned.reason for planned in plan.tensors.values() if planned.reason]
    assert {row[0]: int(row[1]) for row in reasons[1:]} == {
        reason: kept.count(reason) for reason in kept
    }
    joined = " ".join(text.split())
    assert f"would have exactly {plan.size:,} bytes" in joined
    assert "(--tensors lists every tensor)" in joined
    assert "layers.0.attention.qkv" not in text


def test_a_dry_run_with_every_tensor(all_in_one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(all_in_one.parent)
    plan = zm.plan_conversion(all_in_one)
    assert max(map(len, plan.tensors)) > 76
    text = run_in_terminal(["convert", all_in_one.name, "--dry-run", "--tensors"], 80)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).split("\r\n")
    assert all(len(line) <= 80 for line in lines if line not in plan.tensors)
    for name, planned in plan.tensors.items():
        details = lines[lines.index(name) + 1]
        shape = "x".join(map(str, planned.source.shape))
        becomes = "MXFP8" if planned.action == "quantize" else "BF16"
        kind = planned.source.dtype
        assert details.startswith(f"    {shape} {kind} -> {becomes if kind != 'F32' else kind}, ")
        assert f"{plan.output_nbytes(name):,} bytes" in details


def test_recipes_break_no_pattern() -> None:
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", run_in_terminal(["recipes"], 80))
    lines = text.split("\r\n")
    patterns = [
        rule.pattern.pattern
        for name in ("uniform", "zimage", "zimage-refiner", "convert-to-quant")
        for rule in zm.load_recipe(name).keep
    ]
    found = [line.strip() for line in lines if line.strip() in patterns]
    assert found and set(found) == set(patterns)
    assert all(len(line) <= 80 for line in lines if line.strip() not in patterns)


def test_a_pattern_longer_than_the_terminal(tmp_path: Path) -> None:
    pattern = "|".join(rf"^layers\.{i}\.attention\.qkv\.weight$" for i in range(9))
    (tmp_path / "own.toml").write_text(
        f"[[keep]]\nname = 'nine'\npattern = '{pattern}'\nreason = '{'because ' * 30}'\n"
    )
    lines = run_in_terminal(["recipes", str(tmp_path / "own.toml")], 80).split("\r\n")
    assert f"    {pattern}" in lines
    assert sum(line.count("because") for line in lines) == 30


def test_results_are_shown_before_files_are_written(
    in_process: Run, tiny_here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk does not take minutes of measuring along."""

    def full(file: AtomicFile) -> AtomicFile:
        raise zm.OutputError(f"{file.target} could not be written: no space")

    monkeypatch.setattr(AtomicFile, "__enter__", full)
    for words, shown in (
        ("probe tiny.safetensors --csv o", "To keep only them"),
        ("compare tiny.safetensors --low-rank none --csv o", "mxfp8-e4m3"),
        ("compare tiny.safetensors --low-rank none --write-recipe o", "mxfp8-e4m3"),
        (
            "sensitivity tiny.safetensors --size 32 --timesteps 1 --device cpu --html o",
            "layers.0.feed_forward.w1",
        ),
    ):
        result = in_process(*words.split())
        assert result.returncode == 1 and result.stderr.endswith("could not be written: no space\n")
        assert shown in result.stdout, result.stdout
    only(tiny_here, "in.safetensors", "tiny.safetensors")


def test_files_are_written_though_nobody_reads_the_results(tiny_here: Path) -> None:
    words = ["compare", "tiny.safetensors", "--low-rank", "none", "--csv", "c.csv", "--json"]
    reading, writing = os.pipe()
    os.close(reading)
    program = [sys.executable, "-u", "-m", "zimage_mxfp8", *words]
    result = subprocess.run(program, cwd=tiny_here, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (result.returncode, result.stderr) == (1, b"")
    assert (tiny_here / "c.csv").read_text().count("\n") > 10


# ---- an interrupted analysis


def test_an_interrupted_analysis_says_what_it_keeps(in_process: Run, tiny_here: Path) -> None:
    words = [
        "sensitivity",
        "tiny.safetensors",
        "--size",
        "32",
        "--timesteps",
        "1",
        "--device",
        "cpu",
    ]
    words += ["--state", "s.json", "--write-recipe", "s.toml"]
    program = f"""
from zimage_mxfp8.analysis.sensitivity.state import State
write = State._write
def write_and_press(self):
    write(self)
    press()
State._write = write_and_press
start(*{words!r})
"""
    result = run_program(program, tiny_here)
    assert result.returncode == 130
    assert result.stderr.splitlines()[-1] == (
        "zimage-mxfp8: error: interrupted; s.json keeps the measurements, and the same command "
        "continues from there"
    )
    assert len(json.loads((tiny_here / "s.json").read_text())["errors"]) == 1
    only(tiny_here, "in.safetensors", "s.json", "tiny.safetensors")
    assert in_process(*words).returncode == 0
    only(tiny_here, "in.safetensors", "s.json", "s.toml", "tiny.safetensors")


def test_an_analysis_interrupted_before_it_measured_anything(tiny_here: Path) -> None:
    program = """
on_import("torch", press)
start("sensitivity", "tiny.safetensors", "--state", "s.json")
"""
    interrupted(run_program(program, tiny_here))
    only(tiny_here, "in.safetensors", "tiny.safetensors")


@pytest.mark.parametrize(
    "words",
    [
        ["convert", ""],
        ["convert", "-i", ""],
        ["convert", "a", ""],
        ["convert", "a", "--recipe", ""],
        ["inspect", ""],
        ["validate", "a", "--against", ""],
        ["dequantize", "", "-o", "b.safetensors"],
        ["probe", ""],
        ["compare", ""],
        ["generate", "--model-dir", "", "--prompt", "a"],
        ["generate", "--model-dir", "a", "--transformer", "", "--prompt", "a"],
    ],
    ids=" ".join,
)
def test_empty_names_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """An empty path is the current folder to Python; a script means a variable that is not set."""
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the name is empty; name a file" in line


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["probe", "a", "--threads", "x"],
            '--threads: must be a whole number of at least 0, not "x"',
        ),
        (["probe", "a", "--threads", "-1"], 'must be a whole number of at least 0, not "-1"'),
        (["compare", "a", "--sample", "0"], 'must be a fraction above 0 and up to 1, not "0"'),
        (
            ["compare", "a", "--bound", "nan"],
            'must be a relative squared error: finite, and at least 0, not "nan"',
        ),
        (["serve", "--ray", "--replicas", "0"], "must be auto, or a whole number of at least 1"),
        (["sensitivity", "a", "--bound", "x" * 99], f'must be a number, not "{"x" * 40}..."'),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_wrong_numbers_are_told_in_a_sentence(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line and "invalid" not in line


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["validate", "a", "--lora", "b"],
            "--lora cannot be used without the original; give --against",
        ),
    ],
)
def test_options_in_sentences_of_the_library(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err == f"zimage-mxfp8: error: {sentence}\n"


@pytest.mark.parametrize(
    ("words", "commands"),
    [
        (["--help"], set()),
        (["--version"], set()),
        (["dequantize", "--help"], {"dequantize"}),
        (["convert", "--help"], {"convert"}),
        (["generate", "--help"], {"generate"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_help_imports_little(words: list[str], commands: set[str]) -> None:
    """Only the command that is named, and nothing of size."""
    program = (
        "import sys; before = set(sys.modules); from zimage_mxfp8.cli.main import main; "
        f"main({words!r}); print(*(set(sys.modules) - before), sep='\\n', file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    imported = set(result.stderr.split())
    assert "zimage_mxfp8.cli.arguments" in imported
    assert {name for name in PARSERS if f"zimage_mxfp8.cli.{name}" in imported} == commands
    large = {"dataclasses", "inspect", "tempfile", "json", "numpy", "rich", "safetensors", "torch"}
    ours = {"checkpoint.hub", "checks", "generation.settings", "ops", "printing"}
    assert imported.isdisjoint(large | {f"zimage_mxfp8.{name}" for name in ours})
