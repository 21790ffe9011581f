"""Measurements kept in a file, so that an interrupted run can continue."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ...checkpoint.header import unreadable
from ...checkpoint.output import write_file
from ...errors import UsageError
from .measure import OutputError

_MAX_SHOWN = 80  # characters of the values that differ; those of a checkpoint are long


class State:
    """Errors by quantised layers, kept in a JSON file if a path is given.

    Args:
        path: the file; None to keep nothing.
        run: everything that the measurements depend on. A file of another run is refused.

    Raises:
        CheckpointError: the file cannot be read.
        UsageError: the file belongs to another run, or is not a state file.
    """

    def __init__(self, path: Path | None, run: dict[str, Any]) -> None:
        self._path = path
        self._run = run
        self._errors: dict[str, list[OutputError]] = {}
        if path is not None and path.exists():
            self._read(path)

    def errors(self, name: str, measure: Callable[[], list[OutputError]]) -> list[OutputError]:
        """Return the measurement under a name; measure it if it is missing."""
        if name not in self._errors:
            self._errors[name] = measure()
            self._write()
        return self._errors[name]

    def _read(self, path: Path) -> None:
        remedy = "name another file, or delete it"
        try:
            document = json.loads(path.read_text("utf-8"))
        except OSError as error:
            raise unreadable(path, error) from None
        except (ValueError, RecursionError):
            document = None
        if not _is_state(document):
            raise UsageError("state", f"{path} is not the state of a sensitivity run", remedy)
        for key, value in self._run.items():
            if key not in document["run"]:
                raise UsageError("state", f"{path} has no {key}", remedy)
            found = document["run"][key]
            if found != value:
                both = f" ({found}, not {value})"
                shown = both if len(both) < _MAX_SHOWN else ""
                raise UsageError("state", f"{path} is of a run with another {key}{shown}", remedy)
        errors = document["errors"]
        self._errors = {name: [OutputError(**e) for e in cases] for name, cases in errors.items()}

    def _write(self) -> None:
        if self._path is None:
            return
        errors = {name: [asdict(e) for e in cases] for name, cases in self._errors.items()}
        content = json.dumps({"run": self._run, "errors": errors}).encode()
        write_file(self._path, content, overwrite=True)


def _is_state(document: Any) -> bool:
    """Return whether this is the content of a state file: finite errors for each name."""
    if not isinstance(document, dict) or set(document) != {"run", "errors"}:
        return False
    run, errors = document["run"], document["errors"]
    return (
        isinstance(run, dict)
        and isinstance(errors, dict)
        and all(_are_errors(cases, run.get("timesteps")) for cases in errors.values())
    )


def _are_errors(cases: Any, count: Any) -> bool:
    names = {field.name for field in fields(OutputError)}
    return (
        isinstance(cases, list)
        and len(cases) == count
        and all(isinstance(case, dict) and set(case) == names for case in cases)
        and all(isinstance(e, float) and 0 <= e < math.inf for case in cases for e in case.values())
    )
