"""Argument types and options that several commands share."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from .streams import tell


def spellings(*names: str) -> list[str]:
    """Each option name in its dash and its underscore spelling."""
    result = list(names)
    for name in names:
        body = name.lstrip("-")
        for other in (body.replace("-", "_"), body.replace("_", "-")):
            if name.startswith("--") and f"--{other}" not in result:
                result.append(f"--{other}")
    return result


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, without the usage before it.

    Options are not abbreviated: what is short today may be ambiguous tomorrow.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """What a command does not know is its own error, and not that of the main parser."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return known, unknown

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        tell(f"error: {message} (see {self.prog} --help)")
        sys.exit(2)


def file_path(text: str) -> Path:
    """A file to write, for `type=`."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty; name a file")
    if text.endswith(("/", os.sep)):
        raise argparse.ArgumentTypeError(f"{text} is a folder; name a file")
    return Path(text)


def count(minimum: int) -> type[int]:
    """A whole number of at least `minimum`, for `type=`."""

    def parse(text: str) -> int:
        number = int(text)
        if number < minimum:
            raise ValueError
        return number

    parse.__name__ = f"number of at least {minimum}"
    return parse  # type: ignore[return-value]


def add_threads(parser: argparse.ArgumentParser) -> None:
    """`--threads`."""
    parser.add_argument(
        "--threads",
        type=count(0),
        default=0,
        metavar="N",
        help="cores to use (default: all)",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """`--json`."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """`--overwrite`."""
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
