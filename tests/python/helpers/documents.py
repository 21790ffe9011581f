"""The pages of the documentation, their code blocks, and a shell to run them in."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[3]
README = ROOT / "README.md"
GUIDE = ROOT / "docs" / "guide"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]


def text_of(page: Path) -> str:
    return page.read_text("utf-8")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", text_of(page), re.DOTALL)


def block_with(page: Path, language: str, word: str) -> str:
    """The only block of a page that has a word."""
    (block,) = [block for block in blocks(page, language) if word in block]
    return block


def command_lines(page: Path) -> list[list[str]]:
    """The arguments of every `zimage-mxfp8 ...` in a page's shell blocks."""
    found = []
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            starts = [i for i, word in enumerate(words) if word == "zimage-mxfp8"]
            for start in starts:
                rest = words[start + 1 :]
                found.append(rest[: rest.index("&&")] if "&&" in rest else rest)
    return found


def anchors(page: Path) -> set[str]:
    """What links to headings of a page end with."""
    outside_blocks = re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)", outside_blocks, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", x).strip().lower().replace(" ", "-") for x in headings}


def _environment() -> dict[str, str]:
    # Commands that other tests run in this process may have made diffusers quiet.
    kept = {k: v for k, v in os.environ.items() if not k.endswith("_VERBOSITY")}
    return {**kept, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def run_in_shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run commands as a page has them, with this environment's programs."""
    return subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env=_environment(),
        capture_output=True,
        text=True,
        check=True,
    )


def run_in_python(block: str, folder: Path) -> str:
    """Run a block as a program in this process, and return what it prints.

    A process of its own would import torch and diffusers once more, which takes seconds.
    """
    before, printed = Path.cwd(), io.StringIO()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other libraries
            exec(compile(block, "<block>", "exec"), {"__name__": "__main__"})
    finally:
        os.chdir(before)
    return printed.getvalue()
