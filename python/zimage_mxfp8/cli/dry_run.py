"""`zimage-mxfp8 convert --dry-run`: the plan as text or as JSON."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from ..text import plural

if TYPE_CHECKING:
    from ..conversion.plan import Plan
    from ..printing.screen import Screen

_MAX_REASONS = 15


def show(plan: Plan, output: Path, arguments: argparse.Namespace) -> int:
    """Show the plan of a conversion."""
    from ..printing.screen import size_text
    from . import display

    display.warn(plan.warnings)
    if arguments.json:
        display.print_json(_plan_document(plan, output))
        return 0
    screen = display.screen()
    title = plan.options.weight_format.title
    screen.table(
        f"Plan for {plan.checkpoint.path} (recipe {plan.recipe.name}): tensors that "
        f"become {title}, those that are kept, and their size now and then",
        ["group", f"{title}>", "kept>", "now>", "then>"],
        _group_rows(plan),
    )
    kept = Counter(planned.reason for planned in plan.tensors.values() if planned.reason)
    shown = kept.most_common(_MAX_REASONS)
    rows = [[reason, f"{number:,}"] for reason, number in shown]
    screen.table("Why tensors are kept", ["why", "tensors>"], rows)
    if len(kept) > len(shown):
        more = plural(len(kept) - len(shown), "more reason")
        screen.text(f"... and {more} (--tensors shows them)")
    if arguments.tensors:
        _print_tensors(plan, screen)
    for note in plan.notes:
        screen.text(note)
    for adapter in plan.adapters:
        kinds = ", ".join(f"{count} {kind}" for kind, count in adapter.kinds.items())
        screen.text(
            f"{adapter.path} would be merged at weight {adapter.weight:g}: "
            f"{plural(adapter.layers, 'layer')} ({kinds})"
        )
    before = plan.checkpoint.nbytes
    screen.text(
        f"{output} would have exactly {plan.size:,} bytes ({size_text(plan.size)}), "
        f"{(plan.size - len(plan.header)) / before - 1:+.1%}; "
        f"{plural(len(plan.quantized), 'layer')} in {title}"
        + ("" if arguments.tensors else " (--tensors lists every tensor)")
    )
    return 0


def _print_tensors(plan: Plan, screen: Screen) -> None:
    """Print two lines per tensor: names may be as long as a terminal is wide."""
    screen.text("Tensors", style="bold")
    for name, planned in plan.tensors.items():
        stored = planned.source.stored
        shape = "x".join(map(str, stored.shape)) or "scalar"
        becomes = f"{_becomes(plan, name)}, {plan.output_nbytes(name):,} bytes"
        why = f", kept: {planned.reason}" if planned.reason else ""
        screen.line(name)
        screen.text(f"    {shape} {stored.dtype} -> {becomes}{why}", indent=" " * 6)


def _becomes(plan: Plan, name: str) -> str:
    quantized = plan.tensors[name].action == "quantize"
    return plan.options.weight_format.title if quantized else plan.places[name].dtype


def _group_rows(plan: Plan) -> list[list[str]]:
    from ..printing.screen import size_text

    groups: dict[str, list[int]] = {}
    for name, planned in plan.tensors.items():
        row = groups.setdefault(planned.group, [0, 0, 0, 0])
        row[0 if planned.action == "quantize" else 1] += 1
        row[2] += planned.source.stored.nbytes
        row[3] += plan.output_nbytes(name)
    ordered = sorted(groups.items(), key=lambda item: -item[1][2])
    return [
        [name, f"{quantized:,}", f"{kept:,}", size_text(before), size_text(after)]
        for name, (quantized, kept, before, after) in ordered
    ]


def _plan_document(plan: Plan, output: Path) -> dict[str, object]:
    return {
        "input": str(plan.checkpoint.path),
        "output": str(output),
        "format": plan.options.format,
        "recipe": plan.recipe.name,
        "quantized": len(plan.quantized),
        "input_bytes": plan.checkpoint.nbytes,
        "output_bytes": plan.size - len(plan.header),
        "file_bytes": plan.size,
        "warnings": list(plan.warnings),
        "notes": list(plan.notes),
        "loras": [adapter.to_dict() for adapter in plan.adapters],
        "tensors": {
            name: {
                "dtype": planned.source.stored.dtype,
                "shape": list(planned.source.shape),
                "becomes": _becomes(plan, name),
                "bytes": plan.output_nbytes(name),
                "group": planned.group,
                "reason": planned.reason,
            }
            for name, planned in plan.tensors.items()
        },
    }
