"""The extras of this package: what each needs, and what of that is missing."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

_PACKAGE = "zimage-mxfp8"
_OF_CONTRIBUTORS = ("test", "dev")
_REQUIREMENT = re.compile(
    r"""(?P<name>[\w.-]+)\s*(?P<bounds>[^;]*);.*\bextra\s*==\s*["'](?P<extra>[\w.-]+)["']"""
)


@dataclass(frozen=True)
class Extra:
    """An extra.

    Attributes:
        name: of the extra.
        missing: packages that it needs and that are not installed, or too old, with the reason.
        command: what installs it.
    """

    name: str
    missing: list[str]
    command: str


def find_extras() -> list[Extra]:
    """All but those that only contributors need, from the package's own metadata."""
    extras: dict[str, list[str]] = {}
    for requirement in requires(_PACKAGE) or []:
        found = _REQUIREMENT.match(requirement)
        if found is None or found["extra"] in _OF_CONTRIBUTORS or found["name"] == _PACKAGE:
            continue  # the last is `all`, which consists of others
        if not _is_for_this_python(requirement):
            continue
        missing = extras.setdefault(found["extra"], [])
        if problem := _problem(found["name"], found["bounds"]):
            missing.append(problem)
    return [
        Extra(name, missing, f'pip install "{_PACKAGE}[{name}]"')
        for name, missing in extras.items()
    ]


def _is_for_this_python(requirement: str) -> bool:
    """Whether a marker on the Python version, the only kind that pyproject.toml has, holds."""
    found = re.search(r"""python_version\s*(<|>=)\s*["']([\d.]+)["']""", requirement)
    if found is None:
        return True
    is_older = sys.version_info[:2] < _numbers(found[2])
    return is_older if found[1] == "<" else not is_older


def _problem(name: str, bounds: str) -> str:
    """Why a package does not do; "" if it does. Only lower bounds are looked at."""
    try:
        installed = version(name)
    except PackageNotFoundError:
        return name
    lowest = re.search(r">=\s*([\d.]+)", bounds)
    if lowest and _numbers(installed) < _numbers(lowest[1]):
        return f"{name} {lowest[1]} or newer ({installed} is installed)"
    return ""


def _numbers(text: str) -> tuple[int, ...]:
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, found[0].split("."))) if found else ()
