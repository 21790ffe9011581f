"""How size and error change with the number of layers that stay in BF16."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from ...printing.screen import size_text
from ...text import plural
from ..exclusions import merged_pattern
from .markup import element, text


@dataclass(frozen=True)
class KeepOrder:
    """Layers in the order in which they are worth keeping, and what keeping each changes.

    A page's slider chooses how many of them are kept. Its script adds up these numbers as `nbytes`
    and `errors` do.

    Attributes:
        names: names of the weights without prefix, the first to keep first.
        smallest: bytes of the file that keeps none of them.
        added: bytes that keeping each adds.
        parts: what quantising each adds to the error.
        chosen: how many the slider keeps at first.
        error: what the error is, such as "relative error of the output".
        start: what the number in `chosen` is, in a word.
        root: whether the error is the root of the sum of the parts.
        percent: whether it is shown in percent.
        measured: numbers of kept layers for which the error was measured; None if all errors are
            exact.
        whole: whether the pattern of exclusions matches whole names only, with the prefix.
        prefix: of the names in the checkpoint.
        always: weights that are kept whatever the slider says, beside `names`; `smallest` has them
            in BF16.
        rest: what all other weights add to the error; added before the root.
    """

    names: Sequence[str]
    smallest: int
    added: Sequence[int]
    parts: Sequence[float]
    chosen: int
    error: str
    start: str = "Recommended"
    root: bool = False
    percent: bool = False
    measured: Sequence[int] | None = None
    whole: bool = False
    prefix: str = ""
    always: Sequence[str] = ()
    rest: float = 0.0

    def nbytes(self) -> list[int]:
        """Return the size of the file for each number of `names` that is kept, from 0."""
        return list(accumulate(self.added, initial=self.smallest))

    def errors(self) -> list[float]:
        """Return the error for each number of `names` that is kept, from 0."""
        sums = list(accumulate(reversed(self.parts), initial=self.rest))[::-1]
        return [math.sqrt(max(total, 0.0)) if self.root else total for total in sums]

    def error_text(self, error: float) -> str:
        """Return an error as people read it, with three digits."""
        return f"{100 * error:.3g} %" if self.percent else f"{error:.3g}"

    def kept(self) -> list[str]:
        """Return the names of the weights that are kept at first."""
        return [*self.always, *self.names[: self.chosen]]

    def pattern(self) -> str:
        """Return the pattern that excludes the weights kept at first; empty if there are none."""
        names = (self.prefix + name for name in self.kept())
        return merged_pattern(names, whole=self.whole) or ""

    def to_dict(self) -> dict[str, object]:
        """Return what the page's script needs, for JSON."""
        return {
            "names": list(self.names),
            "smallest": self.smallest,
            "added": list(self.added),
            "parts": list(self.parts),
            "root": self.root,
            "percent": self.percent,
            "measured": None if self.measured is None else list(self.measured),
            "whole": self.whole,
            "prefix": self.prefix,
            "always": list(self.always),
            "rest": self.rest,
        }


def slider(keep: KeepOrder) -> str:
    """Return the control that chooses how many layers are kept, as HTML."""
    least = len(keep.always)
    count, chosen = least + len(keep.names), least + keep.chosen
    number = element("output", f"{chosen:,}", class_="count")
    label = element("label", f"Keep {number} of {plural(count, 'layer')} in BF16", for_="keep")
    bar = element(
        "input", id="keep", type="range", min=least, max=count, value=chosen, autocomplete="off"
    )
    reset = element("button", f"{keep.start}: {chosen:,}", type="button", class_="reset")
    size, error = keep.nbytes()[keep.chosen], keep.errors()[keep.chosen]
    figures = "".join(
        element("div", element("dt", text(title)) + element("dd", value, class_=name))
        for title, name, value in (
            ("size of the file", "size", size_text(size)),
            (keep.error, "error", keep.error_text(error)),
        )
    )
    how = "" if keep.measured is None else element("span", _how(keep), class_="how")
    control = element("div", label + reset + bar, class_="control")
    readings = element("dl", figures, class_="readings")
    return element("div", control + readings + how, class_="keep")


def _how(keep: KeepOrder) -> str:
    measured = keep.measured is not None and keep.chosen in keep.measured
    return "this error was measured" if measured else "this error is estimated"
