"""A recipe that `convert` takes, from what was measured."""

from __future__ import annotations

import re

from ...recipes import load_recipe
from .run import CARD, SensitivityReport


def recipe_text(report: SensitivityReport) -> str:
    """The smallest set of exclusions as TOML, each with the figure behind it."""
    errors = {measured.name: measured.error for measured in report.layers}
    everything, smallest = report.everything, report.smallest
    lines = [
        f'title = "Measured: output error of at most {report.bound:g}"',
        'description = """',
        f"Keeps {len(smallest.kept)} layers: relative error of the output {smallest.error:.4f},",
        f'instead of {everything.error:.4f} with every layer quantised. By "zimage-mxfp8',
        'sensitivity".',
        '"""',
    ]
    # What is no layer of a block was not measured, and stays as in every other recipe.
    for rule in load_recipe(CARD).keep:
        if not any(rule.matches(f"{name}.weight", "") for name in errors):
            lines += _rule(rule.name, rule.pattern.pattern, rule.reason)
    for name in smallest.kept:
        error = errors[name]
        reason = (
            f"alone it moves the output by {error.total:.2e} of its energy "
            f"(low frequencies {error.low:.2e}, high {error.high:.2e})"
        )
        lines += _rule(name, f"^{re.escape(name)}\\.", reason)
    return "\n".join(lines) + "\n"


def _rule(name: str, pattern: str, reason: str) -> list[str]:
    return [
        "",
        "[[keep]]",
        f'name = "{name}"',
        f"pattern = '{pattern}'",
        f'reason = "{reason}"',
    ]
