"""Prompts from a text file."""

from __future__ import annotations

import os

from ...checkpoint.header import unreadable
from ...checks import path as path_argument
from ...errors import CheckpointError

_MAX_BYTES = 16 << 20
MAX_CHARACTERS = 10_000  # of a prompt; the text encoder takes 512 tokens


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """Read one prompt per line; empty lines and lines that begin with # are skipped.

    Args:
        path: a UTF-8 file.

    Raises:
        CheckpointError: the file cannot be read, is not UTF-8, has no prompts, or has a line that
            is too long for one.
    """
    file = path_argument("path", path)
    try:
        if not file.is_file():
            what = "is not a regular file" if file.exists() else "does not exist"
            raise CheckpointError(f"the prompts file {file} {what}; check the path")
        with file.open("rb") as opened:
            content = opened.read(_MAX_BYTES + 1)
    except OSError as error:
        raise unreadable(file, error) from None
    if len(content) > _MAX_BYTES:
        raise CheckpointError(
            f"the prompts file {file} has more than {_MAX_BYTES >> 20} MiB; name a text file with "
            "one prompt per line"
        )
    prompts = []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            prompt = line.decode("utf-8").strip()
        except UnicodeDecodeError:
            raise CheckpointError(
                f"line {number:,} of the prompts file {file} is not UTF-8 text; save it as UTF-8"
            ) from None
        if not prompt or prompt.startswith("#"):
            continue
        if len(prompt) > MAX_CHARACTERS:
            raise CheckpointError(
                f"line {number:,} of the prompts file {file} has {len(prompt):,} characters; a "
                f"prompt may have {MAX_CHARACTERS:,}"
            )
        prompts.append(prompt)
    if not prompts:
        raise CheckpointError(f"the prompts file {file} has no prompts; write one per line")
    return prompts
