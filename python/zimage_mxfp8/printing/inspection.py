"""The contents of a checkpoint."""

from __future__ import annotations

from ..checkpoint.inspection import Inspection
from .screen import Screen, size_text

_LONGEST_VALUE = 200  # characters of metadata


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
        screen.text(f"no command takes it: it {found.refusal}")
        return
    screen.table(title, ["group", "tensors", "parameters>", "size>"], rows)
    screen.text(f"{found.parameters:,} parameters, {size_text(found.nbytes)}")
    if found.provenance:
        version = found.provenance.get("version", "of an unknown version")
        made = (f"{k.replace('_', ' ')} {v}" for k, v in found.provenance.items() if k != "version")
        screen.text(f"converted by zimage-mxfp8 {version}: {', '.join(made)}")
    if found.accepted_by:
        screen.text(f"accepted by {', '.join(found.accepted_by)}")
    elif found.refusal:
        screen.text(f"no command takes it: it {found.refusal}")
    for key, value in found.metadata.items():
        end = "..." if len(value) > _LONGEST_VALUE else ""
        screen.text(f"metadata {key}: {value[:_LONGEST_VALUE]}{end}")
