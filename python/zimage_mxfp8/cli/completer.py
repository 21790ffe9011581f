"""Completion of a shell's command line, by argcomplete's protocol."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Iterable, Iterator

from argcomplete.completers import BaseCompleter, FilesCompleter
from argcomplete.finders import CompletionFinder

from ..conversion.recipes import builtin_names

_FILES = re.compile("FILE|PATH|DIR|FOLDER|ORIGINAL|OUT|PNG")  # in placeholders
_RECIPES = "NAME|FILE"


class _Values(BaseCompleter):
    """Completions for options and positional arguments without choices, by placeholder."""

    def __call__(
        self,
        *,
        prefix: str,
        action: argparse.Action,
        parser: argparse.ArgumentParser,  # noqa: ARG002
        parsed_args: argparse.Namespace,  # noqa: ARG002
    ) -> Iterable[str]:
        placeholder = str(action.metavar or "")
        files: Iterable[str] = []
        if _FILES.search(placeholder):
            with contextlib.suppress(UnicodeDecodeError):  # a name in the folder that is not UTF-8
                files = FilesCompleter()(prefix)
        return [*builtin_names(), *files] if placeholder == _RECIPES else files


def answer(parser: argparse.ArgumentParser) -> None:
    """Print the completions that the shell requested, and exit."""
    second_spellings = [option for option in _options(parser) if "_" in option]
    CompletionFinder()(
        parser,
        always_complete_options=False,
        exclude=second_spellings,
        default_completer=_Values(),
    )


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _options(command)
