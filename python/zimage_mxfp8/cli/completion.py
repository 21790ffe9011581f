"""`zimage-mxfp8 completion`."""

from __future__ import annotations

import argparse

_SHELLS = ("bash", "zsh", "fish")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser], line: str) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "completion",
        help=line,
        description="Print the script that completes commands, options, choices, recipes and "
        'files. For bash: eval "$(zimage-mxfp8 completion bash)" in ~/.bashrc; for zsh: eval '
        '"$(zimage-mxfp8 completion zsh)" in ~/.zshrc, after compinit; for fish: zimage-mxfp8 '
        "completion fish | source in ~/.config/fish/config.fish.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("shell", choices=_SHELLS, metavar="|".join(_SHELLS))


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from argcomplete.shell_integration import shellcode

    print(shellcode(["zimage-mxfp8"], shell=arguments.shell))
    return 0
