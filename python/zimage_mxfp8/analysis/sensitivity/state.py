"""Measurements that outlive an interrupted run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...checkpoint.output import write_file
from ...errors import UsageError
from .measure import OutputError


class State:
    """Errors by what was quantised, kept in a JSON file if there is one.

    Args:
        path: the file; None to keep nothing.
        run: what the measurements depend on. A file of another run is refused.

    Raises:
        UsageError: the file is of another run, or no such file.
    """

    def __init__(self, path: Path | None, run: dict[str, Any]) -> None:
        self._path = path
        self._run = run
        self._errors: dict[str, list[OutputError]] = {}
        if path is not None and path.exists():
            self._read(path)

    def errors(self, name: str, measure: Callable[[], list[OutputError]]) -> list[OutputError]:
        """What was measured under a name, measured now if it was not yet."""
        if name not in self._errors:
            self._errors[name] = measure()
            self._write()
        return self._errors[name]

    def _read(self, path: Path) -> None:
        again = f"{path} is no state of a sensitivity run; name another --state, or delete it"
        try:
            document = json.loads(path.read_text("utf-8"))
            run, errors = document["run"], document["errors"]
            known = {name: [OutputError(**e) for e in cases] for name, cases in errors.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UsageError(again) from None
        for key, value in self._run.items():
            if run.get(key) != value:
                raise UsageError(
                    f"{path} is of a run with another {key} ({run.get(key)}, not {value}); name "
                    "another --state, or delete it"
                )
        self._errors = known

    def _write(self) -> None:
        if self._path is None:
            return
        errors = {name: [asdict(e) for e in cases] for name, cases in self._errors.items()}
        content = json.dumps({"run": self._run, "errors": errors}).encode()
        write_file(self._path, content, overwrite=True)
