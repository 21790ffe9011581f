"""The contents of a checkpoint."""

from __future__ import annotations

from typing import Any

from ..adapters.summary import AdapterSummary
from ..checkpoint.inspection import Inspection
from ..text import plural
from .screen import Screen, size_text

_LONGEST_VALUE = 200  # characters of metadata
_MAX_SHOWN = 5  # modules that do not fit


def print_inspection(found: Inspection, screen: Screen) -> None:
    """Print an `Inspection`, without its breaches."""
    rows = [
        [
            group.name,
            ", ".join(f"{count} {name}" for name, count in group.formats.items()),
            f"{group.parameters:,}",
            size_text(group.nbytes),
        ]
        for group in found.groups
    ]
    files = f", {found.files} files" if found.files > 1 else ""
    quantized = f", quantised: {found.quantization}" if found.quantization else ""
    title = f"{found.path}: {found.kind}{quantized}{files}"
    if not rows:
        screen.text(title)
        screen.text(f"no command takes it: {found.refusal}")
        return
    screen.table(title, ["group", "tensors", "parameters>", "size>"], rows)
    screen.text(f"{found.parameters:,} parameters, {size_text(found.nbytes)}")
    if found.adapter:
        _print_adapter(found.adapter, screen)
    if found.provenance:
        version = found.provenance.get("version", "of an unknown version")
        made = [
            f"{key.replace('_', ' ')} {_merged(value) if key == 'loras' else value}"
            for key, value in found.provenance.items()
            if key != "version"
        ]
        how = "merged" if found.provenance.keys() == {"version", "loras"} else "converted"
        screen.text(f"{how} by zimage-mxfp8 {version}: {', '.join(made)}")
    if found.accepted_by:
        screen.text(f"accepted by {', '.join(found.accepted_by)}")
    elif found.refusal:
        is_for_others = found.adapter is not None and found.adapter.is_for_other_widths
        model = " with the released Z-Image" if is_for_others else ""
        screen.text(f"no command takes it{model}: {found.refusal}")
    for key, value in found.metadata.items():
        end = "..." if len(value) > _LONGEST_VALUE else ""
        screen.text(f"metadata {key}: {value[:_LONGEST_VALUE]}{end}")


def _print_adapter(adapter: AdapterSummary, screen: Screen) -> None:
    for what, counts in (
        ("kinds", adapter.kinds),
        ("names begin with", {f'"{x}"': count for x, count in adapter.spellings.items()}),
        ("tensors", adapter.dtypes),
        ("ranks", adapter.ranks),
        ("alphas", {f"{alpha:g}": count for alpha, count in adapter.alphas.items()}),
    ):
        if counts:
            listed = ", ".join(f"{key} ({count:,})" for key, count in counts.items())
            screen.text(f"{what}: {listed}")
    if adapter.rank_scaled:
        screen.text("rsLoRA: alpha is divided by the root of the rank")
    if adapter.base_model:
        screen.text(f"trained on: {adapter.base_model}")
    if adapter.targets:
        rows = [[title, f"{count:,}"] for title, count in adapter.targets.items()]
        screen.table("Fits Z-Image", ["layer", "modules>"], rows)
    elif adapter.is_for_other_widths:
        screen.text("fits no released Z-Image, perhaps one of other widths")
    for name, problem in list(adapter.misfits.items())[:_MAX_SHOWN]:
        screen.text(f'does not fit: "{name}" {problem}')
    for names, one, many in (
        (list(adapter.misfits)[_MAX_SHOWN:], "more module does not fit", "more modules do not fit"),
        (
            adapter.unmatched,
            "tensor belongs to nothing in Z-Image",
            "tensors belong to nothing in Z-Image",
        ),
        (
            adapter.text_encoder,
            "tensor is for the text encoder, and not applied",
            "tensors are for the text encoder, and not applied",
        ),
    ):
        if names:
            screen.text(f'{plural(len(names), one, many)} ("{names[0]}" is one)')


def _merged(loras: Any) -> str:
    """Return the adapters of a file's origin: the beginning of each SHA-256, and its weight."""
    return ", ".join(f"{lora['sha256'][:12]} at {lora['weight']}" for lora in loras)
