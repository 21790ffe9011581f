"""Check from headers alone that a checkpoint has the tensors of a whole Z-Image."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from ..dtypes import FLOAT_NAMES, SAFETENSORS_BITS
from ..errors import CheckpointError
from .scopes import Scope
from .source import Checkpoint

MAX_NAMED = 5
# Dtypes of no weight, plain or in a format of quantised models (`quantization.py`).
_NO_WEIGHT = {
    dtype
    for dtype in SAFETENSORS_BITS
    if dtype not in (*FLOAT_NAMES, "F64", "F4") and not dtype.startswith("F8_")
}
_UNRECOGNISED = "is missing, without which ComfyUI does not recognise Z-Image"

Problem = tuple[str, str]  # a tensor, and its problem


def missing_or_misshapen(
    checkpoint: Checkpoint,
    scope: Scope,
    logical_shapes: Mapping[str, tuple[int, ...]] | None = None,
    *,
    for_comfyui: bool = True,
) -> list[Problem]:
    """Return the problems that keep a model's tensors from being a whole Z-Image, in name order.

    The number of blocks and the widths are taken from the tensors themselves.

    Args:
        checkpoint: in ComfyUI's layout.
        scope: the model's tensors.
        logical_shapes: shapes before padding, by name, of weights that are quantised.
        for_comfyui: whether the noise refiner, by which ComfyUI recognises Z-Image, must exist.
    """
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    shapes.update(logical_shapes or {})
    inner = {i: shapes[name] for i, name in scope.inner_names(shapes).items()}
    anchor = inner.get(scope.table.anchor)
    if anchor is None:
        return [(scope.prefix + scope.table.anchor, "is missing")]
    if len(anchor) != 2 or 0 in anchor:
        return [(scope.prefix + scope.table.anchor, f"is {list(anchor)}, not [dim, features]")]
    expected = scope.table.expected_shapes(inner)
    problems = [
        (scope.prefix + name, _UNRECOGNISED)
        for name in scope.table.signature
        if for_comfyui and name not in inner
    ]
    for name, shape in expected.items():
        if name not in inner:
            if not (for_comfyui and name in scope.table.signature):
                problems.append((scope.prefix + name, "is missing"))
        elif inner[name] != shape:
            problems.append((scope.prefix + name, f"is {list(inner[name])}, not {list(shape)}"))
        elif (
            for_comfyui
            and scope.prefix + name not in (logical_shapes or {})
            and (dtype := checkpoint.tensors[scope.prefix + name].dtype) in _NO_WEIGHT
        ):
            problems.append((scope.prefix + name, f"is {dtype}, not BF16, F16, F32 or F64"))
    return sorted(problems)


def unknown_weights(
    checkpoint: Checkpoint, scope: Scope, scales: Collection[str] = ()
) -> list[Problem]:
    """Return matrices under a block's name that Z-Image's blocks do not have, in name order.

    Args:
        checkpoint: the file.
        scope: the model's tensors.
        scales: names of the scales of quantised layers.
    """
    known = _known(checkpoint, scope)
    return sorted(
        (name, "is not a weight of Z-Image")
        for name, tensor in checkpoint.tensors.items()
        if name in scope
        and name not in scales
        and len(tensor.shape) == 2
        and (tensor.dtype in FLOAT_NAMES or name.endswith(".weight"))
        and scope.table.split(scope.inner(name))
        and scope.inner(name) not in known
    )


def unknown_parameters(checkpoint: Checkpoint, scope: Scope) -> list[Problem]:
    """Return weights and biases that would change the model's results, in name order."""
    known = _known(checkpoint, scope)
    part = f"is not part of a {scope.table.title}, and would change its results"
    return sorted(
        (name, part)
        for name, tensor in checkpoint.tensors.items()
        if name in scope
        and name.endswith((".weight", ".bias"))
        and tensor.dtype not in _NO_WEIGHT
        and scope.inner(name) not in known
    )


def double_precision(checkpoint: Checkpoint, scope: Scope) -> list[Problem]:
    """Return the model's tensors in F64, in name order: ComfyUI takes them, the loader does not."""
    known = _known(checkpoint, scope)
    return sorted(
        (name, "is F64, which generate does not take")
        for name, tensor in checkpoint.tensors.items()
        if name in scope and tensor.dtype == "F64" and scope.inner(name) in known
    )


def _known(checkpoint: Checkpoint, scope: Scope) -> Collection[str]:
    inner = {
        i: checkpoint.tensors[n].shape for i, n in scope.inner_names(checkpoint.tensors).items()
    }
    return scope.table.expected_shapes(inner) if len(inner.get(scope.table.anchor, ())) == 2 else ()


def structure_error(
    checkpoint: Checkpoint, scope: Scope, problems: Sequence[Problem]
) -> CheckpointError:
    """Return the error for structural problems of a model; it names up to five of them."""
    named = "; ".join(f'"{tensor}" {problem}' for tensor, problem in problems[:MAX_NAMED])
    rest = len(problems) - MAX_NAMED
    more = f"; and {rest:,} more" if rest > 0 else ""
    return CheckpointError(
        f"{checkpoint.path} is not a whole {scope.table.title}: {named}{more}; download or export "
        "the checkpoint again"
    )
