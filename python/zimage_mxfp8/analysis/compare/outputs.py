"""The files that `compare` writes from its report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ...checkpoint.output import check_distinct, check_target, write_file
from ...conversion.recipes import recipe_toml
from .report import CompareReport


@dataclass(frozen=True)
class CompareOutputs:
    """The files, checked before the work and written after it.

    Attributes:
        csv: takes every layer's figures; None: not written.
        write_recipe: takes the recipe; None: not written.
        bound: relative squared error above which the recipe keeps a layer.
        overwrite: replace existing files.
    """

    csv: Path | None
    write_recipe: Path | None
    bound: float
    overwrite: bool

    def check(self, inputs: Iterable[Path]) -> None:
        """Check that the files may be written.

        Args:
            inputs: files that are read.

        Raises:
            UsageError: two are the same file, or one is an input.
            OutputError: a folder is missing or not writable, or a file exists already.
        """
        named = {"csv": self.csv, "write_recipe": self.write_recipe}
        for name, path in named.items():
            if path is not None:
                check_target(path, inputs, overwrite=self.overwrite, argument=name)
        check_distinct(named)

    def warnings(self, report: CompareReport) -> list[str]:
        """Return what a user should know about the files."""
        if self.write_recipe is None or len(report.kept(self.bound)) < len(report.layers):
            return []
        return [
            f"the recipe for a bound of {self.bound:g} keeps every layer, which convert refuses: "
            "choose a larger bound"
        ]

    def write(self, report: CompareReport) -> None:
        """Write the files.

        Raises:
            OutputError: one cannot be written.
        """
        if self.write_recipe is not None:
            content = recipe_toml(report.recipe(self.bound)).encode()
            write_file(self.write_recipe, content, overwrite=self.overwrite)
        if self.csv is not None:
            write_file(self.csv, report.to_csv().encode(), overwrite=self.overwrite)
