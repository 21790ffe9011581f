"""The extras of this package and their requirements, from its installed metadata."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Final

_PACKAGE = "zimage-mxfp8"
_OF_CONTRIBUTORS = ("dev", "docs", "test")
_REQUIREMENT = re.compile(
    r"""(?P<name>[\w.-]+)(?:\[[^]]*\])?\s*(?P<bounds>[^;]*);.*\bextra\s*==\s*["'](?P<extra>[\w.-]+)["']"""
)
# The module of a package if its name does not follow from the package's.
_MODULES: Final = {"pillow": "PIL", "scikit-image": "skimage"}


@dataclass(frozen=True)
class Requirement:
    """A package that an extra needs.

    Attributes:
        package: its name for pip.
        bounds: the versions that are accepted, such as ">=5".
    """

    package: str
    bounds: str

    @property
    def module(self) -> str:
        """Name of its module in Python."""
        return _MODULES.get(self.package, self.package.replace("-", "_"))

    def problem(self) -> str:
        """Why the installed version is not accepted; "" if it is. Only lower bounds are checked."""
        try:
            installed = version(self.package)
        except PackageNotFoundError:
            return self.package
        lowest = re.search(r">=\s*([\d.]+)", self.bounds)
        if lowest and _numbers(installed) < _numbers(lowest[1]):
            return f"{self.package} {lowest[1]} or newer ({installed} is installed)"
        return ""


@dataclass(frozen=True)
class Extra:
    """An extra.

    Attributes:
        name: name of the extra.
        missing: required packages that are not installed or too old, with the reason.
        command: the command that installs it.
    """

    name: str
    missing: list[str]
    command: str


def requirements() -> dict[str, list[Requirement]]:
    """Return the requirements by extra for this version of Python, without contributors' extras."""
    extras: dict[str, list[Requirement]] = {}
    for requirement in requires(_PACKAGE) or []:
        found = _REQUIREMENT.match(requirement)
        if found is None or found["extra"] in _OF_CONTRIBUTORS or found["name"] == _PACKAGE:
            continue  # the last is `all`, which consists of others
        if _is_for_this_python(requirement):
            needs = Requirement(found["name"], found["bounds"])
            extras.setdefault(found["extra"], []).append(needs)
    return extras


def install_command(extra: str) -> str:
    """Return the command that installs an extra."""
    return f'pip install "{_PACKAGE}[{extra}]"'


def find_extras() -> list[Extra]:
    """Check the installed packages of each extra."""
    return [
        Extra(name, list(filter(None, (each.problem() for each in needs))), install_command(name))
        for name, needs in requirements().items()
    ]


def _is_for_this_python(requirement: str) -> bool:
    """Return whether a marker holds; pyproject.toml has only markers on the Python version."""
    found = re.search(r"""python_version\s*(<|>=)\s*["']([\d.]+)["']""", requirement)
    if found is None:
        return True
    is_older = sys.version_info[:2] < _numbers(found[2])
    return is_older if found[1] == "<" else not is_older


def _numbers(text: str) -> tuple[int, ...]:
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, found[0].split("."))) if found else ()
