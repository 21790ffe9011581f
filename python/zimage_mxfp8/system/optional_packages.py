"""Imports of optional packages, and the error for a missing one; `extras.py` has the table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Final

from ..errors import MissingExtraError

# The modules of this package that cannot be imported without an extra.
_NEEDED: Final[dict[str, str]] = {
    "analysis.evaluate.run": "evaluate",
    "analysis.evaluate.report": "evaluate",
    "analysis.sensitivity.run": "torch",
    "generation.generator": "generate",
    "transformer.model": "torch",
}
_OURS: Final = __name__.partition(".")[0]


def import_part(module: str, what: str) -> ModuleType:
    """Import a module of this package by its name in it, "transformer.model" for example.

    Args:
        module: its name.
        what: the command or name that needs it, for the sentence.

    Raises:
        MissingExtraError: a package that it needs is missing.
    """
    if module not in _NEEDED:
        return import_module(f".{module}", _OURS)
    with needed(_NEEDED[module], what):
        return import_module(f".{module}", _OURS)


@contextmanager
def needed(extra: str, what: str) -> Iterator[None]:
    """Turn import errors of optional packages in the block into a sentence.

    Args:
        extra: the extra that has the packages.
        what: what needs them: an option, a command or a name.

    Raises:
        MissingExtraError: a package is missing, or is installed and cannot be imported.
    """
    try:
        yield
    except Exception as error:  # packages of other versions, and libraries, fail in any way
        module = _missing_module(error)
        is_import_error = isinstance(error, (ImportError, RuntimeError))
        if module.partition(".")[0] == _OURS or (not is_import_error and _failing(error) == _OURS):
            raise
        # An error of a block inside this one too: `what` of the outer block is what the user asked
        # for.
        raise missing(extra, what, _problem(extra, module, error), module) from error


def missing(extra: str, what: str, needs: str, module: str = "") -> MissingExtraError:
    """Return the error for a package that is missing or too old.

    Args:
        extra: the extra that brings it.
        what: the option, command or name that needs it.
        needs: the package and its problem.
        module: name of the module that cannot be imported.
    """
    from .extras import install_command

    return MissingExtraError(
        f"{what} needs {needs}", f"run {install_command(extra)}", module or None
    )


def _missing_module(error: BaseException | None) -> str:
    """Return the module that failed to import first; diffusers' lazy modules wrap that error."""
    found = ""
    while error is not None:
        if isinstance(error, ImportError) and error.name:
            found = error.name
        error = error.__cause__ or error.__context__
    return found


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # half of it
        return False


def _first_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _failing(error: BaseException) -> str:
    """Return the package whose code failed, "" if it cannot be told."""
    name = ""
    place = _first_cause(error).__traceback__
    while place is not None:
        module = str(place.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        if module not in ("", "importlib", "contextlib"):
            name = module
        place = place.tb_next
    return name


def _problem(extra: str, module: str, error: BaseException) -> str:
    from .extras import requirements

    packages = {each.module: each.package for each in requirements()[extra]}
    absent = [package for name, package in packages.items() if not _is_there(name)]
    if module in packages and packages[module] in absent:
        *others, last = absent
        if not others:
            return f"{last}, which is not installed"
        return f"{', '.join(others)} and {last}, which are not installed"
    cause = _first_cause(error)
    reason = str(cause).strip().splitlines() or [type(cause).__name__]
    failing = _failing(error)
    if failing in ("", _OURS, "__main__"):
        named = " and ".join(packages.values())
    else:
        named = packages.get(failing, failing)
    return f"{named}, which cannot be imported ({reason[0]})"
