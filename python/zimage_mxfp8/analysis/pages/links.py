"""Links between the pages of reports that lie beside each other."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from stat import S_IMODE
from typing import Final
from urllib.parse import quote, unquote_to_bytes

from ...checkpoint.output import write_file
from ...errors import OutputError
from .markup import element, text

_WITH_FOLDER = "evaluate"  # the report that is a folder
REPORTS: Final = ("probe", "compare", "sensitivity", "evaluate")  # commands that write a page
_BRAND = element("span", "zimage-mxfp8", class_="brand")
_BEGIN, _END = f'<nav aria-label="Reports">{_BRAND}'.encode(), b"</nav>"
_LONGEST = 16 << 10  # bytes of a navigation, with long names of folders
_LARGEST = 4 << 20  # bytes; pages are smaller


def navigation(report: str, links: Mapping[str, str]) -> str:
    """Return the names of all reports, as links where there is one.

    Args:
        report: the one of this page.
        links: addresses by the report's name, relative to this page.
    """
    items = [_BRAND]
    for name in REPORTS:
        if name == report:
            items.append(element("strong", text(name), aria_current="page"))
        else:
            items.append(_link(name, links[name]) if name in links else _missing(name))
    return element("nav", "".join(items), aria_label="Reports")


def _link(report: str, address: str) -> str:
    return element("a", text(report), href=quote(os.fsencode(address)))


def _missing(report: str) -> str:
    why = f"{report}.html was not beside this page when it was written"
    return element("span", text(report), title=why)


def links_beside(page: Path) -> dict[str, str]:
    """Return the default names of the reports' pages that are in a page's folder, by report.

    The page of `evaluate` is in a folder of its own, which is looked for beside the page.

    Args:
        page: the page that will be written; it is not linked itself.
    """
    names = {report: f"{report}.html" for report in REPORTS}
    if evaluations := _evaluations(page.absolute().parent):
        names[_WITH_FOLDER] = f"{evaluations[-1].parent.name}/{names[_WITH_FOLDER]}"
    return {
        report: name
        for report, name in names.items()
        if name != page.name and (page.parent / name).is_file()
    }


def links_above(folder: Path) -> dict[str, str]:
    """Return the addresses of the reports' pages beside the folder of `evaluate`, by report."""
    beside = links_beside(folder.absolute())
    return {report: f"../{name}" for report, name in beside.items() if report != _WITH_FOLDER}


def _evaluations(folder: Path) -> list[Path]:
    """Return the pages of `evaluate` in folders of a folder, the newest last."""
    try:
        found = [(page.stat().st_mtime_ns, page) for page in folder.glob(f"*/{_WITH_FOLDER}.html")]
    except OSError:
        return []
    return [page for _, page in sorted(found)]


def link_from_beside(page: Path) -> None:
    """Let the pages beside a new page link to it, where they have its name without a link.

    Files that are not pages of this package, or cannot be read or written, stay as they are.

    Args:
        page: of `probe`, `compare` or `sensitivity`; pages with other names are not linked.
    """
    if page.name in {f"{report}.html" for report in REPORTS}:
        folder = page.absolute().parent
        _link_from(folder, page.stem, page.name)
        for other in _evaluations(folder):
            _add_link(other, page.stem, f"../{page.name}")


def link_from_above(folder: Path) -> None:
    """Let the pages beside a new folder of `evaluate` link to its page, as `link_from_beside`."""
    folder = folder.absolute()
    _link_from(folder.parent, _WITH_FOLDER, f"{folder.name}/{_WITH_FOLDER}.html")


def _link_from(folder: Path, report: str, address: str) -> None:
    for other in REPORTS:
        if other != report:
            _add_link(folder / f"{other}.html", report, address)


def _add_link(page: Path, report: str, address: str) -> None:
    """Replace a page by one with a link, if it is one without."""
    with contextlib.suppress(OSError, OutputError):
        is_link = page.is_symlink() or page.parent.is_symlink()  # to a page with other neighbours
        if is_link or not page.is_file() or not os.access(page, os.W_OK):
            return
        if (before := page.stat()).st_size > _LARGEST:
            return
        content = page.read_bytes()
        begin = content.find(_BEGIN)
        end = content.find(_END, begin, begin + _LONGEST)
        if begin < 0 or end < 0:
            return
        navigation = content[begin:end]
        changed = _with_link(page.parent, navigation, report, address)
        now = page.stat()
        was_replaced = (now.st_ino, now.st_mtime_ns) != (before.st_ino, before.st_mtime_ns)
        if changed == navigation or was_replaced:
            return
        write_file(page, content[:begin] + changed + content[end:], overwrite=True)
        page.chmod(S_IMODE(before.st_mode))


def _with_link(folder: Path, navigation: bytes, report: str, address: str) -> bytes:
    """Return a navigation with a link in place of a name without one, or of a link to nothing."""
    new = _link(report, address).encode()
    link = re.compile(rb'<a href="([^"]*)">' + re.escape(text(report)).encode() + rb"</a>")
    if (found := link.search(navigation)) is not None:
        if (folder / os.fsdecode(unquote_to_bytes(found[1]))).exists():
            return navigation
        return navigation[: found.start()] + new + navigation[found.end() :]
    return navigation.replace(_missing(report).encode(), new)
