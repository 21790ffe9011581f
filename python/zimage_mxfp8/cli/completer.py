"""Completion of a shell's command line, by argcomplete's protocol."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Iterable

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
    CompletionFinder()(parser, always_complete_options=False, default_completer=_Values())
