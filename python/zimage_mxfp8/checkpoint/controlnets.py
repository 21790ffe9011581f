"""What a ControlNet for Z-Image is, told from its tensors."""

from __future__ import annotations

from collections.abc import Mapping

from ..zimage.control import REFINER, ControlConfig
from .identify import Identified
from .source import TensorReader


def control_config(
    found: Identified, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> ControlConfig:
    """Return the sizes and the kind of a ControlNet; reads one bias.

    Args:
        found: a file of kind `ZIMAGE_CONTROLNET`.
        shapes: before padding, by name without prefix; by default those of the file.

    Raises:
        CheckpointError: the bias cannot be read.
    """
    names = found.scope.inner_names(found.checkpoint.tensors)
    if shapes is None:
        shapes = {inner: found.checkpoint.tensors[name].shape for inner, name in names.items()}
    return ControlConfig.of_shapes(
        shapes, found.scope.table, trained_refiner=_has_trained_refiner(found, names)
    )


def _has_trained_refiner(found: Identified, names: Mapping[str, str]) -> bool:
    """Whether the first hint of its own refiner can be other than zero.

    Generation 2.0 has the tensors of 2.1, but was trained without its refiner, so that the
    projection still has the zeros that it began with. A bias shows it as well as the matrix.
    """
    name = names.get(f"{REFINER}.0.after_proj.bias")
    if name is None:
        return False
    with TensorReader() as reader:
        return bool(reader.read(found.checkpoint.tensors[name]).any())
