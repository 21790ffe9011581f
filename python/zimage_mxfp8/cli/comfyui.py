"""`zimage-mxfp8 comfyui`: the node package, in a folder of ComfyUI."""

from __future__ import annotations

import argparse

from .arguments import add_overwrite, local_path

_NAME = "zimage-mxfp8"
_FILES = ("__init__.py", "pyproject.toml")
_OTHERS = ("README.md", "__pycache__")  # of a copy of the repository's folder, and of Python


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser], line: str) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "comfyui",
        help=line,
        description=f"Write the node package to DIR/custom_nodes/{_NAME}. Run it with the Python "
        "that runs ComfyUI, and start ComfyUI again.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("action", choices=("install",), metavar="install", help="what to do")
    parser.add_argument("directory", type=local_path, metavar="DIR", help="the folder of ComfyUI")
    add_overwrite(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from importlib.resources import files

    from ..checkpoint.output_folder import write_folder
    from ..errors import UsageError
    from . import display

    nodes = arguments.directory / "custom_nodes"
    if not nodes.is_dir():
        raise UsageError(
            "directory",
            f"{arguments.directory} has no folder custom_nodes",
            "name the folder that ComfyUI's main.py is in",
        )
    target = nodes / _NAME
    if target.is_symlink():
        raise UsageError(
            "directory", f"{target} is a link to another folder", "remove the link, then install"
        )
    package = files("zimage_mxfp8") / "comfy" / "node_package"  # importing comfy would need torch
    contents = ((name, (package / name).read_bytes()) for name in _FILES)
    write_folder(target, contents, (*_FILES, *_OTHERS), overwrite=arguments.overwrite)
    display.wrote(target, "the node package; start ComfyUI again")
    return 0
