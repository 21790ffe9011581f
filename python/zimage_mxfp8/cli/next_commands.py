"""Command lines to copy, for the advice of a report."""

from __future__ import annotations

import shlex
from pathlib import Path

from ..checkpoint.file_names import checkpoint_beside


def convert_command(source: str, options: str, name: str) -> str:
    """Return a conversion with other options than the defaults.

    It names an output, with `name` in it: the default one may exist already.
    """
    output = shlex.quote(str(checkpoint_beside(Path(source), f"-{name}")))
    return f"zimage-mxfp8 convert {shlex.quote(source)} {options} -o {output}"


def convert_with_recipe(source: str, recipe: Path) -> str:
    """Return a conversion with a recipe file."""
    return convert_command(source, f"--recipe {shlex.quote(str(recipe))}", recipe.stem)
