"""The pages that commands write."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..checkpoint.output import write_file

if TYPE_CHECKING:
    from ..analysis.pages.page import Origin


def write_page(arguments: argparse.Namespace, render: Callable[[Origin], str]) -> None:
    """Write the page of `--html`, if it is given, and links to it into the pages beside it.

    Args:
        arguments: of the command, with `html`, `overwrite` and `command_line`.
        render: returns the page as HTML.
    """
    if arguments.html is None:
        return
    from ..analysis.pages.links import link_from_beside, links_beside
    from ..analysis.pages.page import Origin

    origin = Origin(arguments.command_line, links_beside(arguments.html))
    write_file(arguments.html, render(origin).encode(), overwrite=arguments.overwrite)
    link_from_beside(arguments.html)
