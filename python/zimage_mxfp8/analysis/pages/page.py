"""The shell of every page: header, facts, tiles and sections.

A page is one HTML file that needs no network. Sections hold blocks, which are objects with an
`html` method: those of `blocks.py`, `network.py` and `chart.py`, or a report's own. Everything but
sliders, sorting and downloads reads without scripts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, Protocol

from ..._core import __version__
from .links import navigation
from .markup import breakable, element, text

_FOLDER = Path(__file__).parent
_MARKS = {"none": "", "good": "✓", "bad": "!"}  # so that colour is not all that tells


class Block(Protocol):
    """Part of a section."""

    def html(self) -> str:
        """Return the block as HTML, with every name in it escaped."""


@dataclass(frozen=True)
class Fact:
    """Something that a reader needs to repeat the run, in the page's header.

    Attributes:
        label: what it is, such as "seed".
        value: as people read it.
    """

    label: str
    value: str


@dataclass(frozen=True)
class Tile:
    """One figure of the verdict.

    Attributes:
        label: what it is.
        value: the figure, in few characters.
        note: what it is compared with, or where it comes from.
        verdict: "good" and "bad" have a colour and a mark.
    """

    label: str
    value: str
    note: str = ""
    verdict: Literal["none", "good", "bad"] = "none"


@dataclass(frozen=True)
class Section:
    """Part of a page, with a title of its own.

    Attributes:
        title: its title.
        blocks: what it shows, from the top.
    """

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Origin:
    """How a page came to be.

    Attributes:
        command: the command line that wrote it; None if a program did.
        links: address of other reports' pages by the report's name, relative to this page; see
            `links_beside` in links.py.
    """

    command: str | None = None
    links: Mapping[str, str] = field(default_factory=dict)


FROM_PROGRAM: Final = Origin()  # of a page without a command, and without known neighbours


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        report: the command, one of `REPORTS` in links.py.
        title: what it is about, with the checkpoint's name.
        question: the question that it answers, in one sentence.
        facts: about the run; the version is put before them, and the command after.
        tiles: three to five, with the verdict.
        sections: from the top; the map of the network is the first.
        origin: how the page came to be.
    """

    report: str
    title: str
    question: str
    facts: Sequence[Fact]
    tiles: Sequence[Tile]
    sections: Sequence[Section]
    origin: Origin = FROM_PROGRAM


def render_page(page: Page, *, styles: str = "", scripts: str = "") -> str:
    """Return a page as HTML, with scripts and styles inside.

    Args:
        page: what it shows.
        styles: CSS of blocks that only this report has.
        scripts: JavaScript of such blocks, run after the page's own.
    """
    style, script = (
        "".join((_FOLDER / f"{name}.{kind}").read_text("utf-8") for name in names)
        for kind, names in (
            ("css", ("page", "network")),
            ("js", ("downloads", "tables", "network")),
        )
    )
    sections = "\n".join(map(_section, page.sections))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{text(page.title)}</title>
<link rel="icon" href="data:,">
<style>
{style}{styles}</style>
</head>
<body>
<header>
{navigation(page.report, page.origin.links)}
<h1>{breakable(page.title)}</h1>
<p class="question">{text(page.question)}</p>
{_facts(page)}
</header>
<main>
{_tiles(page.tiles)}
{sections}
</main>
<script>
"use strict";
{script}{scripts}</script>
</body>
</html>
"""


def _facts(page: Page) -> str:
    facts = [Fact("version", __version__), *page.facts]
    pairs = "".join(
        element("div", element("dt", text(fact.label)) + element("dd", text(fact.value)))
        for fact in facts
    )
    command = ""
    if page.origin.command is not None:
        label = element("dt", "command")
        command = element("div", label + element("dd", _code(page.origin.command)), class_="wide")
    return element("dl", pairs + command, class_="facts")


def _code(words: str) -> str:
    return element("code", text(words))


def _tiles(tiles: Sequence[Tile]) -> str:
    return element("div", "".join(map(_tile, tiles)), class_="tiles")


def _tile(tile: Tile) -> str:
    mark = _MARKS[tile.verdict]
    shown = element("span", mark, class_="mark", aria_hidden="true") if mark else ""
    parts = [
        element("h2", text(tile.label)),
        element("p", shown + text(tile.value), class_="value"),
        element("p", breakable(tile.note), class_="note") if tile.note else "",
    ]
    return element("article", "".join(parts), class_=f"tile {tile.verdict}")


def _section(section: Section) -> str:
    blocks = "\n".join(block.html() for block in section.blocks)
    return f"<section>\n<h2>{text(section.title)}</h2>\n{blocks}\n</section>"
