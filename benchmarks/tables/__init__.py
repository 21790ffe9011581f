"""Tables of the documentation, from the committed results.

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`; a function in the module
of its document makes it.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Mapping

from ..report import ROOT
from . import methodology, performance

DOCUMENTS: dict[str, Mapping[str, Callable[[], str]]] = {
    "docs/performance.md": performance.TABLES,
    "docs/methodology.md": methodology.TABLES,
}
MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def with_tables(text: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """Return a document with its tables rebuilt; KeyError if one has an unknown name."""
    return MARKED.sub(lambda match: match[1] + tables[match[2]]() + match[3], text)


def update(*, check: bool) -> int:
    """Write the documents' tables, or only compare them; return 1 if that finds a difference."""
    different = 0
    for name, tables in DOCUMENTS.items():
        before = (ROOT / name).read_text("utf-8")
        after = with_tables(before, tables)
        if not check:
            (ROOT / name).write_text(after, "utf-8")
            continue
        lines = (text.splitlines(keepends=True) for text in (before, after))
        sys.stdout.writelines(difflib.unified_diff(*lines, name, "the results"))
        different |= before != after
    return int(different)
