"""Errors: what they carry for any front end, and how the command line words them."""

from __future__ import annotations

import argparse
import ast
import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

import zimage_mxfp8 as zm
from zimage_mxfp8.analysis.probe.scoring import ProbeRules
from zimage_mxfp8.cli.command_line import build_parser, command_parsers
from zimage_mxfp8.cli.main import main
from zimage_mxfp8.cli.wording import sentence

PACKAGE = Path(zm.__file__).parent
COMMAND_LINE = PACKAGE / "cli"


def parsers(*command: str) -> tuple[argparse.ArgumentParser, ...]:
    """The parsers by which a command words errors."""
    return tuple(command_parsers(build_parser().parse_args(command).command))


def options_of(command: argparse.ArgumentParser) -> dict[str, list[str]]:
    return {action.dest: action.option_strings for action in command._actions}


def texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and value of every string literal that is not a docstring; {} for what f-strings put in.

    An expression that is a string by itself is a docstring.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.JoinedStr):
            parts = [v.value if isinstance(v, ast.Constant) else "{}" for v in node.values]
            yield node.lineno, "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
        yield from texts(node)


def library_texts() -> Iterator[tuple[str, str]]:
    for file in sorted(PACKAGE.rglob("*.py")):
        if COMMAND_LINE not in file.parents:
            for line, text in texts(ast.parse(file.read_text("utf-8"))):
                yield f"{file.relative_to(PACKAGE)}:{line}", text


# ---- the library knows no options


FLAG = re.compile(r"(?<![\w-])--[a-z]")


def test_no_text_of_the_library_has_an_option() -> None:
    assert FLAG.search("add --overwrite, please") and not FLAG.search("a -- b --> c")
    found = [(place, text) for place, text in library_texts() if FLAG.search(text)]
    assert len(list(library_texts())) > 1000
    assert found == []


def test_the_walk_finds_texts_in_f_strings_and_skips_docstrings() -> None:
    tree = ast.parse('def f(x):\n    "--doc"\n    raise ValueError(f"{x} needs --a" "b", "--c")\n')
    assert {text for _, text in texts(tree)} >= {"{} needs --ab", "--c"}
    assert all("--doc" not in text for _, text in texts(tree))


def test_every_argument_that_a_hint_names_has_an_option() -> None:
    known = {dest for parser in parsers("doctor") for dest in options_of(parser)}
    named = {
        name for _, text in library_texts() for name in re.findall(r"`(\w+)(?:=[^`]*)?`", text)
    }
    assert {"overwrite", "any_model", "compute", "nonfinite", "layers"} <= named
    assert named - known == set()


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        (("generate", "--model-dir", "m"), zm.GenerationSettings),
        (("convert", "f"), zm.ConversionOptions),
        (("probe", "f"), ProbeRules),
    ],
)
def test_settings_have_options_of_their_names(command: tuple[str, ...], settings: type) -> None:
    own, *_ = parsers(*command)
    given = {field.name for field in fields(settings) if field.init}
    assert given - options_of(own).keys() == set()


# ---- what an error carries


def test_parts_of_a_usage_error() -> None:
    with pytest.raises(zm.UsageError) as caught:
        zm.GenerationSettings("a", negative_prompt="b")
    error = caught.value
    assert error.argument == "negative_prompt"
    assert error.problem == "has no effect without guidance"
    assert error.hint == "add `guidance` or drop it"
    assert str(error) == (
        "negative_prompt has no effect without guidance; add `guidance` or drop it"
    )


def test_parts_of_other_errors(small_file: Path, tmp_path: Path) -> None:
    (tmp_path / "o.safetensors").touch()
    with pytest.raises(zm.OutputError) as caught:
        zm.convert(small_file, tmp_path / "o.safetensors")
    assert caught.value.problem == f"the output {tmp_path / 'o.safetensors'} exists"
    assert caught.value.hint == "`overwrite=True` replaces it"
    assert str(caught.value) == f"{caught.value.problem}; {caught.value.hint}"


def test_the_core_s_errors_have_a_problem() -> None:
    with pytest.raises(zm.Error) as caught:
        zm.quantize(np.full((2, 32), np.nan, np.float32))
    assert isinstance(caught.value, zm.NonFiniteError)
    assert caught.value.problem == str(caught.value) and caught.value.hint == ""


@pytest.mark.parametrize(
    "error",
    [
        zm.UsageError("seed", "must be 0 or more", "give another"),
        zm.OutputError("the output exists", "`overwrite=True` replaces it"),
        zm.CheckpointError("is damaged"),
        zm.GenerationError("the image is NaN", 3, "use another seed"),
        zm.NonFiniteError("NaN", 1, 2),
        zm.PrecisionLossError("loses more than its bound", 0.5),
        zm.MissingExtraError("serve needs fastapi", "install it", "fastapi"),
    ],
)
def test_errors_survive_pickling(error: zm.Error) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error) and str(copy) == str(error)
    assert vars(copy) == vars(error)


# ---- the command line's words


def raised(call: Callable[[], object]) -> zm.Error:
    with pytest.raises(zm.Error) as caught:
        call()
    return caught.value


@pytest.mark.parametrize(
    ("command", "call", "words"),
    [
        (
            ("generate", "--model-dir", "m"),
            lambda: zm.GenerationSettings("a", init_image="i.png", strength=2),  # type: ignore[arg-type]
            "--strength must be 0.01 to 1, not 2.0",
        ),
        (
            ("generate", "--model-dir", "m"),
            lambda: zm.GenerationSettings("a", negative_prompt="b"),
            "--negative-prompt has no effect without guidance; add --guidance or drop it",
        ),
        (
            ("convert", "f"),
            lambda: zm.ConversionOptions(calibration_samples=0),
            "--calib-samples must be 1 to 1,000,000, not 0",
        ),
        (
            ("convert", "f"),
            lambda: zm.ConversionOptions(seed=-1),
            "--manual-seed must be 0 or more, and below 2^63",
        ),
        (
            ("probe", "f"),
            lambda: ProbeRules(ar_weight=0.3),
            "--kurtosis-weight and the two other weights must sum to 1, but they sum to 1.2; "
            "change --range-weight or --ar-weight too",
        ),
    ],
)
def test_a_usage_error_is_worded_with_the_option(
    command: tuple[str, ...], call: Callable[[], object], words: str
) -> None:
    assert sentence(raised(call), parsers(*command)) == words


def test_values_in_hints() -> None:
    generate = parsers("generate", "--model-dir", "m")
    error = zm.CheckpointError(
        "x", 'use `compute="weight-only"`, `offload=True` or `any_model=True`; `unknown=1`'
    )
    # The last but one is an option of another command; the last is of none.
    assert sentence(error, generate) == (
        "x; use --compute weight-only, --offload or --any-model; unknown 1"
    )


def test_names_of_files_are_not_taken_for_arguments() -> None:
    error = zm.UsageError("output", "`seed`.safetensors is the input", "choose another name")
    assert sentence(error, parsers("convert", "f")) == (
        "--output `seed`.safetensors is the input; choose another name"
    )


def test_a_command_says_it(
    small_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o.safetensors"
    assert main(["convert", str(small_file), str(out), "--timesteps", "0"]) == 2
    assert capsys.readouterr().err == (
        "zimage-mxfp8: error: --timesteps must be turbo, base or a number up to 1000, not 0\n"
    )
    out.touch()
    assert main(["convert", str(small_file), str(out)]) == 1
    assert capsys.readouterr().err.endswith("exists; --overwrite replaces it\n")
