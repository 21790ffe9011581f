"""Argument types and options that several commands share."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ..text import did_you_mean, is_web_address, nearest, suggestion
from .streams import report_line

_T = TypeVar("_T")
_LONGEST_SHOWN = 40  # characters of a wrong value
_NAMES = re.compile("FILE|PATH|DIR|FOLDER|ORIGINAL|OUT|PNG")  # in placeholders of files
_TEXT = "TEXT"  # placeholder of texts with spaces
# Options of other programs, and the options of a command that do the same.
_ELSEWHERE = {
    "--size": ("--width", "--height"),
    "--resolution": ("--width", "--height"),
    "--cfg": ("--guidance",),
    "--num-images": ("--batch",),
    "--force": ("--overwrite",),
}


class Parser(argparse.ArgumentParser):
    """A parser with one-sentence errors, without the usage before them.

    Options cannot be abbreviated: an abbreviation may become ambiguous in a later version. Giving
    an option with one value twice is an error. Dashes and underscores in options are the same.

    Args:
        intermixed: take positional arguments between options too.
        options: those of `argparse.ArgumentParser`.
    """

    def __init__(self, *, intermixed: bool = False, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self._intermixed = intermixed
        self._is_parsing = False
        self._given: set[argparse.Action] = set()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse; report words that a command does not know as that command's error."""
        if self._is_parsing:  # one of the passes below
            return super().parse_known_args(args, namespace)
        words = self._as_documented(sys.argv[1:] if args is None else args)
        if self._subparsers is None:
            self._check_options(words)
        self._is_parsing = self._intermixed
        self._given.clear()
        try:
            parse = super().parse_known_args
            if self._intermixed:
                parse = self.parse_known_intermixed_args
            known, unknown = parse(words, namespace)
        finally:
            self._is_parsing = False
        if unknown:
            self._check_texts(words, unknown)
            self._refuse(unknown)
        return known, unknown

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        report_line(f"error: {message} (see {self.prog} --help)")
        sys.exit(2)

    def _as_documented(self, words: Sequence[str]) -> list[str]:
        """Return a command line with the options in the spelling of the documentation."""
        documented = {_with_dashes(option): option for option in self._option_string_actions}
        options = list(takewhile(lambda word: word != "--", words))
        for i, word in enumerate(options):
            name, equals, value = word.partition("=")
            if name.startswith("--"):
                options[i] = documented.get(_with_dashes(name), name) + equals + value
        return [*options, *words[len(options) :]]

    def _check_texts(self, words: Sequence[str], unknown: Sequence[str]) -> None:
        """Refuse texts that the shell split into words."""
        texts = [
            option
            for action in self._actions
            if action.metavar == _TEXT
            for option in action.option_strings
        ]
        if not texts or any(word.startswith("-") for word in unknown):
            return
        before = words[: words.index(unknown[0])]
        option = next((word for word in reversed(before) if word.startswith("-")), None)
        if option in texts:
            self.error(
                f'{option} takes one text, and "{unknown[0]}" follows it; put the whole text in '
                "quotes"
            )
        if all(action.option_strings for action in self._actions):
            self.error(
                f"unrecognized arguments: {' '.join(unknown)}; did you mean "
                f'{texts[0]} "{" ".join(unknown)}"?'
            )

    def _check_options(self, words: Sequence[str]) -> None:
        """Refuse unknown options first: the word after one may be a wrong positional argument."""
        before = takewhile(lambda word: word != "--", words)
        options = [word for word in before if word.startswith("--")]
        known = self._option_string_actions
        if unknown := [word for word in options if word.partition("=")[0] not in known]:
            self._refuse(unknown)

    def _refuse(self, unknown: Sequence[str]) -> NoReturn:
        actions = [action for action in self._actions if action.help != argparse.SUPPRESS]
        options = (option for action in actions for option in action.option_strings)
        known = [option for option in options if option.startswith("--")]
        near = [
            option
            for word in unknown
            if word.startswith("-")
            for option in _similar(_with_dashes(word.partition("=")[0]), known)
        ]
        self.error(f"unrecognized arguments: {' '.join(unknown)}{suggestion(near)}")

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        # argparse calls it each time that an option is given.
        if action.option_strings and isinstance(action, argparse._StoreAction):
            if action in self._given:
                raise argparse.ArgumentError(action, "given twice; give it once")
            self._given.add(action)
        # Python takes an empty path for the current folder.
        if "" in arg_strings and _NAMES.search(str(action.metavar or "")):
            raise argparse.ArgumentError(action, "the name is empty; name a file or folder")
        return super()._get_values(action, arg_strings)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        names = [str(choice) for choice in action.choices]
        rest = f"(choose from {', '.join(names)}){did_you_mean([str(value)], names)}"
        if isinstance(action, argparse._SubParsersAction):
            self.error(f'there is no command "{value}" {rest}')
        raise argparse.ArgumentError(action, f'invalid choice "{value}" {rest}')


def _with_dashes(option: str) -> str:
    return option[:2] + option[2:].replace("_", "-")


def _similar(option: str, known: Sequence[str]) -> list[str]:
    """Return the options that may be meant by an unknown one."""
    if found := [other for other in _ELSEWHERE.get(option, ()) if other in known]:
        return found
    sharing = [
        other
        for other in known
        if other.startswith(option)
        or option.startswith(f"{other}-")
        or option.endswith(other[1:])  # with the dash before a whole word
    ]
    return nearest(option, sharing, 0) or nearest(option, known)


def local_path(text: str) -> Path:
    """Return a file or folder, for `type=`."""
    if is_web_address(text):  # of which a path would lose a slash
        raise argparse.ArgumentTypeError(
            f"{text} is a web address; download what it leads to, and name that"
        )
    if "\0" in text:
        raise argparse.ArgumentTypeError("the name has a NUL byte; name a file or folder")
    if text == "-":
        raise argparse.ArgumentTypeError("- names no file or folder here; write ./- if one does")
    return Path(text)


def file_path(text: str) -> Path:
    """Return a file to write, for `type=`."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty; name a file")
    if is_web_address(text):
        raise argparse.ArgumentTypeError(f"{text} is a web address; name a file on this machine")
    path = local_path(text)
    is_folder = os.path.isdir(path)  # noqa: PTH112 - Path.is_dir raises for names of any length
    if is_folder or text.endswith(("/", os.sep)) or path.name in ("", ".."):
        raise argparse.ArgumentTypeError(f"{text} is a folder; name a file")
    return path


def checkpoint_path(text: str) -> Path:
    """Return a safetensors file to write, for `type=`."""
    path = file_path(text)
    if path.suffix.lower() != ".safetensors":
        raise argparse.ArgumentTypeError(
            f"{text} does not end in .safetensors, by which programs recognise these files; add it"
        )
    return path


def converter(convert: Callable[[str], _T], what: str) -> Callable[[str], _T]:
    """Return a function for `type=` that says what the text must be if `convert` fails.

    Args:
        convert: raises ValueError for a wrong text.
        what: completes "must be ...".
    """

    def parse(text: str) -> _T:
        try:
            return convert(text)
        except ValueError:
            shown = text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."
            raise argparse.ArgumentTypeError(f'must be {what}, not "{shown}"') from None

    return parse


def count(minimum: int) -> Callable[[str], int]:
    """Return a function for `type=` that takes whole numbers of at least `minimum`."""

    def convert(text: str) -> int:
        number = int(text)
        if number < minimum:
            raise ValueError
        return number

    return converter(convert, f"a whole number of at least {minimum}")


number = converter(float, "a number")
number_or_none = converter(lambda text: None if text == "none" else float(text), "a number or none")


def add_threads(parser: argparse.ArgumentParser) -> None:
    """Add `--threads`."""
    parser.add_argument(
        "--threads",
        type=count(0),
        default=0,
        metavar="N",
        help="cores to use (default: all)",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """Add `--overwrite`."""
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
