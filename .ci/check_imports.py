"""Check that the modules of the package import only from their own and lower layers.

    python .ci/check_imports.py [PACKAGE] [PAGE]

The order and the exceptions are the two tables under "Order of layers" in docs/architecture.md.
The first lists the layers, the lowest first. A name stands for a module, or for a package with all
modules that no other row names. Modules import from their own layer and from lower ones; the second
table lists every other import with its reason. Imports in functions and under TYPE_CHECKING count.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAX_UPWARDS = 10


def read_tables(page: str) -> tuple[list[list[str]], set[tuple[str, str]], list[str]]:
    """Return the layers, the allowed upward imports, and the tables' errors."""
    section = page.partition("\n## Order of layers\n")[2].partition("\n## ")[0]
    tables = re.findall(r"\|[ :|-]+\|\n((?:\|.*\n?)*)", section)
    if len(tables) != 2:
        return [], set(), ['"Order of layers" must have two tables']
    rows = [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        for table in tables
    ]
    layers = [re.findall(r"`([\w.]+)`", row[0]) for row in rows[0]]
    upwards = {(row[0].strip("`"), row[1].strip("`")) for row in rows[1]}
    problems = [f"{row[0]} -> {row[1]} has no reason" for row in rows[1] if not row[2]]
    if len(upwards) > MAX_UPWARDS:
        problems.append(f"{len(upwards)} imports run upwards, {MAX_UPWARDS} may")
    return layers, upwards, problems


def imports(package: Path) -> Iterator[tuple[str, str]]:
    """Yield pairs of a module and its imports from the package, as dotted names in the package."""
    known = {path.relative_to(package).with_suffix("").parts for path in package.rglob("*.py*")}
    known |= {parts[:-1] for parts in known if parts[-1] == "__init__"}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        if parts in (("__init__",), ("__main__",)):  # they are above all layers
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.ImportFrom) or node.level == 0:
                continue  # of other packages: this one imports its modules relatively
            base = (*parts[: len(parts) - node.level], *(node.module or "").split("."))
            base = tuple(part for part in base if part)
            for alias in node.names:
                target = (*base, alias.name)
                yield ".".join(parts), ".".join(target if target in known else base)


def rank(module: str, layers: list[list[str]]) -> int:
    """Return the number of the layer with the longest name that fits, or -1."""
    fits = [
        (len(name), number)
        for number, names in enumerate(layers)
        for name in names
        if module == name or module.startswith(name + ".")
    ]
    return max(fits)[1] if fits else -1


def check(package: Path, page: str) -> list[str]:
    """Return breaches of the order, one sentence each."""
    layers, allowed, problems = read_tables(page)
    pairs = set(imports(package))
    unplaced = {name for pair in pairs for name in pair if rank(name, layers) < 0}
    upwards = {(a, b) for a, b in pairs if rank(a, layers) < rank(b, layers)}
    problems += [f"{name} is in no layer" for name in sorted(unplaced)]
    problems += [f"{a} imports {b} of a higher layer" for a, b in sorted(upwards - allowed)]
    problems += [f"{a} -> {b} is listed but does not exist" for a, b in sorted(allowed - upwards)]
    return problems


def main(package: Path, page: Path) -> None:
    problems = check(package, page.read_text("utf-8"))
    if problems:
        sys.exit("\n".join(f"{page.name}, order of layers: {problem}" for problem in problems))
    print(f"{package.name} follows the order of layers")


if __name__ == "__main__":
    defaults = ROOT / "python/zimage_mxfp8", ROOT / "docs/architecture.md"
    main(*(Path(given) for given in (*sys.argv[1:], *defaults[len(sys.argv) - 1 :])))
