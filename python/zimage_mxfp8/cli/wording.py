"""Errors of the library in the words of the command line: options instead of arguments.

The parsers alone determine the spelling of an option: an action with the argument's name as its
`dest` is the option of that argument.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

from ..errors import Error, UsageError
from ..text import printable

_ARGUMENT = re.compile(r"`(\w+)(?:=([^`]*))?`")  # in hints, see `Error`


class CommandLineError(Error):
    """A command line that cannot be run. Its sentence names options as they are typed."""


def sentence(error: Error, parsers: Sequence[argparse.ArgumentParser]) -> str:
    """Word an error of the library for the command line.

    Args:
        error: the error.
        parsers: the command's parser, then those of other commands: an error may advise another
            command.
    """
    begin = f"{_option(error.argument, parsers)} " if isinstance(error, UsageError) else ""
    end = f"; {with_options(error.hint, parsers)}" if error.hint else ""
    return printable(f"{begin}{error.problem}{end}")


def with_options(text: str, parsers: Sequence[argparse.ArgumentParser]) -> str:
    """Replace the arguments between backticks in a text of the library by their options."""

    def spelled(match: re.Match[str]) -> str:
        name, value = match.groups()
        option = _option(name, parsers)
        return option if value in (None, "True") else f"{option} {value.strip(chr(34))}"

    return _ARGUMENT.sub(spelled, text)


def _option(argument: str, parsers: Sequence[argparse.ArgumentParser]) -> str:
    """Return the option for an argument, or the argument itself if no command has one."""
    for parser in parsers:
        for action in parser._actions:
            if action.dest == argument:
                return max(action.option_strings, key=_is_long, default=str(action.metavar))
    return argument


def _is_long(option: str) -> bool:
    return option.startswith("--")
