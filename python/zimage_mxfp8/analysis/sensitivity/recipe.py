"""A recipe for `convert`, from the measurements."""

from __future__ import annotations

import re

from ...conversion.recipes import KeepRule, Recipe, rules_outside_blocks
from ...text import plural
from .run import SensitivityReport


def sensitivity_recipe(report: SensitivityReport) -> Recipe:
    """Return the smallest set of exclusions, each with the figure behind it.

    Layers outside the blocks are not measured, and stay as in every other recipe.
    """
    errors = {measured.name: measured.error for measured in report.layers}
    rules = []
    for name in report.smallest.kept:
        error = errors[name]
        reason = (
            f"squared error of the output, quantised alone: {error.total:.2e} of its energy "
            f"(low frequencies {error.low:.2e}, high {error.high:.2e})"
        )
        rules.append(KeepRule(name, re.compile(rf"^{re.escape(name)}\."), reason))
    title = f"Measured: relative error of the output of at most {report.bound:g}"
    description = (
        f"Keeps {plural(len(rules), 'layer')}: relative error of the output "
        f"{report.smallest.error:.4f}, instead of {report.everything.error:.4f} with every layer "
        f"quantised, in compute mode {report.conditions.compute}. By zimage-mxfp8 sensitivity."
    )
    return Recipe(title, title, description, (*rules_outside_blocks(), *rules))
