"""`zimage-mxfp8 convert --dry-run`: the plan as tables or as JSON."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..text import plural

if TYPE_CHECKING:
    from ..conversion.plan import Plan
    from ..recipes import Recipe


def run(arguments: argparse.Namespace, recipe: Recipe) -> int:
    """Show what a conversion would do."""
    from ..conversion.convert import default_output, plan_conversion
    from . import display

    plan = plan_conversion(
        arguments.input,
        recipe=recipe,
        exclude_layers=arguments.exclude_layers,
        any_model=arguments.any_model,
        nonfinite=arguments.nonfinite,
        bias_correction=arguments.bias_correction,
        timesteps=arguments.timesteps,
        modulation_matmul=arguments.modulation_matmul,
        hash_source=arguments.hash_source,
        threads=arguments.threads,
    )
    output = arguments.output or default_output(arguments.input)
    display.warn(plan.warnings)
    display.note(plan.notes)
    if arguments.json:
        display.print_json(_plan_document(plan, output))
        return 0
    display.print_table(
        "Tensors",
        ["tensor", "type", "shape", "becomes", "bytes>", "why"],
        [
            [
                name,
                planned.source.dtype,
                "x".join(map(str, planned.source.shape)) or "scalar",
                _becomes(plan, name),
                f"{plan.output_nbytes(name):,}",
                planned.reason,
            ]
            for name, planned in plan.tensors.items()
        ],
    )
    display.print_table(
        "Groups", ["group", "quantised>", "kept>", "bytes now>", "bytes then>"], _group_rows(plan)
    )
    before = plan.checkpoint.nbytes
    display.console().print(
        f"{output} would have exactly {plan.size:,} bytes ({display.size_text(plan.size)}), "
        f"{(plan.size - len(plan.header)) / before - 1:+.1%}; "
        f"{plural(len(plan.quantized), 'layer')} in MXFP8",
        soft_wrap=True,
    )
    return 0


def _becomes(plan: Plan, name: str) -> str:
    return "MXFP8" if plan.tensors[name].action == "quantize" else plan.places[name].dtype


def _group_rows(plan: Plan) -> list[list[str]]:
    groups: dict[str, list[int]] = {}
    for name, planned in plan.tensors.items():
        row = groups.setdefault(planned.group, [0, 0, 0, 0])
        row[0 if planned.action == "quantize" else 1] += 1
        row[2] += planned.source.nbytes
        row[3] += plan.output_nbytes(name)
    ordered = sorted(groups.items(), key=lambda item: -item[1][2])
    return [[name, *(f"{value:,}" for value in row)] for name, row in ordered]


def _plan_document(plan: Plan, output: Path) -> dict[str, object]:
    return {
        "input": str(plan.checkpoint.path),
        "output": str(output),
        "recipe": plan.recipe.name,
        "quantized": len(plan.quantized),
        "input_bytes": plan.checkpoint.nbytes,
        "output_bytes": plan.size - len(plan.header),
        "file_bytes": plan.size,
        "warnings": list(plan.warnings),
        "tensors": {
            name: {
                "dtype": planned.source.dtype,
                "shape": list(planned.source.shape),
                "becomes": _becomes(plan, name),
                "bytes": plan.output_nbytes(name),
                "group": planned.group,
                "reason": planned.reason,
            }
            for name, planned in plan.tensors.items()
        },
    }
