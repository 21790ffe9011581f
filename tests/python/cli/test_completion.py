"""Completion: argcomplete's protocol, and a real bash."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = Path(sys.executable).parent / "zimage-mxfp8"
BASH = shutil.which("bash")


def completions(line: str, folder: Path, shell: str = "bash") -> list[str]:
    """What the program answers to a shell that completes the end of a line."""
    answer = folder.parent / "answer"
    environment = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_SHELL": shell,
        "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line.encode())),
        "COMP_TYPE": "9",
    }
    result = subprocess.run(
        [PROGRAM], cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    return sorted(answer.read_text().split("\n"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "folder"
    (made / "Z-Image").mkdir(parents=True)
    for name in ("model.safetensors", "with space.safetensors", "own.toml"):
        (made / name).touch()
    return made


needs_bash = pytest.mark.skipif(BASH is None, reason="there is no bash")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("zimage-mxfp8 co", ["comfyui", "compare", "completion", "convert"]),
        ("zimage-mxfp8 completion ", ["bash", "fish", "zsh"]),
        ("zimage-mxfp8 convert --re", ["--recipe", "--report"]),
        ("zimage-mxfp8 convert --exclude", ["--exclude-layers"]),
        ("zimage-mxfp8 convert --lor", ["--lora"]),
        ("zimage-mxfp8 merge", ["merge-lora"]),
        ("zimage-mxfp8 export --to ", ["comfyui", "diffusers", "fp8-rowwise", "int8-convrot"]),
        ("zimage-mxfp8 convert --convro", [""]),  # options that are refused
        (
            "zimage-mxfp8 convert m.safetensors --bias-correction ",
            ["none", "synthetic", "timesteps"],
        ),
        ("zimage-mxfp8 compare m.safetensors --low-rank g", ["groups"]),
        ("zimage-mxfp8 convert --threads ", [""]),
        ("zimage-mxfp8 sensitivity --prompt ", [""]),
    ],
)
def test_words(folder: Path, line: str, expected: list[str]) -> None:
    assert completions(line, folder) == expected


@needs_bash  # argcomplete asks it for files
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("zimage-mxfp8 convert m", ["model.safetensors"]),
        ("zimage-mxfp8 convert model.safetensors w", [r"with\ space.safetensors"]),
        ("zimage-mxfp8 convert -i Z", ["Z-Image/"]),
        ("zimage-mxfp8 validate m", ["model.safetensors"]),
        ("zimage-mxfp8 generate --model-dir Z", ["Z-Image/"]),
        ("zimage-mxfp8 merge-lora model.safetensors w", [r"with\ space.safetensors"]),
        ("zimage-mxfp8 convert m --lora m", ["model.safetensors"]),
        ("zimage-mxfp8 convert m --recipe z", ["zimage", "zimage-refiner"]),
        ("zimage-mxfp8 convert m --recipe o", ["own.toml"]),
        ("zimage-mxfp8 export m", ["model.safetensors"]),
        ("zimage-mxfp8 recipes u", ["uniform"]),
    ],
)
def test_files_and_recipes(folder: Path, line: str, expected: list[str]) -> None:
    assert completions(line, folder) == expected


@needs_bash
def test_a_name_that_is_not_utf8(folder: Path) -> None:
    (folder / os.fsdecode(b"m\xff.safetensors")).touch()
    completions("zimage-mxfp8 convert m", folder)  # without a traceback
    assert "zimage" in completions("zimage-mxfp8 convert m --recipe z", folder)


def test_other_shells_get_descriptions(folder: Path) -> None:
    (line,) = completions("zimage-mxfp8 dequ", folder, "zsh")
    assert line == "dequantize:decode a quantised file to a plain BF16 checkpoint"
    assert completions("zimage-mxfp8 dequ", folder, "fish") == ["dequantize"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_are_printed(shell: str) -> None:
    result = subprocess.run([PROGRAM, "completion", shell], capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == "" and "zimage-mxfp8" in result.stdout
    interpreter = shutil.which(shell)
    if interpreter:  # it is a script of that shell
        checked = subprocess.run([interpreter, "-n"], input=result.stdout, text=True)
        assert checked.returncode == 0


def test_argcomplete_is_imported_for_nothing_else() -> None:
    code = (
        "import sys; from zimage_mxfp8.cli.main import main; code = main(['recipes']); "
        "assert 'argcomplete' not in sys.modules; sys.exit(code)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


class Terminal:
    """An interactive bash."""

    def __init__(self, folder: Path) -> None:
        path = f"{PROGRAM.parent}:{os.environ['PATH']}"
        environment = {"PATH": path, "TERM": "dumb", "PS1": "$ ", "HOME": str(folder)}
        self._pid, self._fd = pty.fork()
        if self._pid == 0:
            os.chdir(folder)
            os.execve(str(BASH), [str(BASH), "--norc", "--noprofile", "-i"], environment)

    def type(self, text: str, until: str) -> str:
        """Type something, and wait for what it leads to."""
        os.write(self._fd, text.encode())
        seen, patience = "", time.monotonic() + 60
        while not re.search(until, seen):
            assert time.monotonic() < patience, seen
            if select.select([self._fd], [], [], 1)[0]:
                seen += os.read(self._fd, 65536).decode()
        return seen

    def close(self) -> None:
        os.close(self._fd)
        os.waitpid(self._pid, 0)


@needs_bash
def test_a_real_bash(folder: Path) -> None:
    bash = Terminal(folder)
    try:
        bash.type('eval "$(zimage-mxfp8 completion bash)"; echo "rea""dy"\n', "ready")
        bash.type("zimage-mxfp8 sens\t", "sensitivity ")
        bash.type("\x15zimage-mxfp8 convert mod\t", r"model\.safetensors ")
        bash.type("--recipe zimage-\t", "zimage-refiner ")
        bash.type("\x15zimage-mxfp8 compare --low-rank gr\t", "groups ")
    finally:
        bash.close()
