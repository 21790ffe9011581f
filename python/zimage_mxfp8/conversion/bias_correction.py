"""Bias correction: the change of a bias that keeps the mean output of a quantised layer.

With weights Wq instead of W, a layer's mean output moves by `-E[x] (W - Wq)^T`, so the bias that
keeps the mean is `b + E[x] (W - Wq)^T`. Each mode here gives, per layer, the vector to use as E[x].

In Z-Image the quantised layers with a bias are the modulations of the blocks. Their input is the
output of `t_embedder`, which depends only on the timestep: its mean over the timesteps of a sampler
is exact, and follows from the checkpoint itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from .. import _core
from ..checkpoint.quantization import WEIGHT_SUFFIX
from ..checkpoint.source import Checkpoint, SourceTensor, TensorReader
from ..dtypes import FLOAT_NAMES, SAFETENSORS_BITS, as_integers
from ..errors import CheckpointError, UnsupportedError
from ..system.optional_packages import needed
from ..zimage.layers import ZIMAGE
from ..zimage.sampling import Vector, sampler_timesteps, timestep_features
from .nonfinite import KeptTensorCheck

if TYPE_CHECKING:
    from .plan import Plan

Mode = Literal["timesteps", "synthetic", "none"]
MODES: tuple[Mode, ...] = ("timesteps", "synthetic", "none")


def embedder_outputs(checkpoint: Checkpoint, prefix: str, timesteps: Vector) -> Vector:
    """Return the output of `t_embedder` for each timestep, [steps, dim], in float64.

    Raises:
        CheckpointError: the embedder's tensors are missing, do not fit together, or lead to NaN.
        NonFiniteError: one of them has NaN or Inf.
    """
    remedy = '`bias_correction="none"` does without'
    tensors = []
    for part in (name for layer in ZIMAGE.time_embedding() for name in layer.tensors):
        name = f"{prefix}{part}"
        tensor = checkpoint.tensors.get(name)
        if tensor is None or tensor.dtype not in FLOAT_NAMES:
            problem = "is missing" if tensor is None else f"is {tensor.dtype}, not BF16, F16 or F32"
            raise CheckpointError(
                f'{checkpoint.path}: tensor "{name}" {problem}, and the bias correction over '
                "timesteps needs it",
                remedy,
            )
        tensors.append(tensor)
    w0, b0, w2, b2 = (tensor.shape for tensor in tensors)
    if not (
        len(w0) == len(w2) == 2 and b0 == w0[:1] and w2[1:] == b0 and b2 == w2[:1] and 0 not in w0
    ):
        raise CheckpointError(
            f'{checkpoint.path} has "{prefix}{ZIMAGE.time_embedder}" tensors that do not fit '
            f"together: {list(w0)}, {list(b0)}, {list(w2)}, {list(b2)}",
            remedy,
        )
    values = []
    with TensorReader() as reader:
        for tensor in tensors:
            data = reader.read(tensor)
            KeptTensorCheck(keep=False).check(tensor, 0, data)
            values.append(to_float64(tensor, data).reshape(tensor.shape))
    weight0, bias0, weight2, bias2 = values
    with np.errstate(over="ignore", invalid="ignore"):  # exp of a large number: silu is 0 then
        hidden = timestep_features(timesteps, w0[1]) @ weight0.T + bias0
        activated = hidden / (1.0 + np.exp(-hidden))
        outputs = np.asarray(activated @ weight2.T + bias2)
    if not np.isfinite(outputs).all():
        raise CheckpointError(
            f'{checkpoint.path}: "{prefix}{ZIMAGE.time_embedder}" tensors give NaN or Inf', remedy
        )
    return outputs


def correction_inputs(plan: Plan) -> tuple[dict[str, Vector], list[str]]:
    """Return the vector to use as E[x], for each quantised layer with a bias.

    Args:
        plan: the conversion, with the mode. "timesteps": the exact mean of `t_embedder`'s output.
            "synthetic": minus the mean of random inputs, which is what convert_to_quant 1.3.4
            uses. "none": no correction.

    Returns:
        Layer name -> vector of K, and the names of the layers with biases that stay uncorrected
        although a correction was requested (their inputs do not follow from the checkpoint).
    """
    layers = {planned.layer: planned.source for planned in plan.quantized if planned.bias}
    options = plan.options
    if not layers or options.bias_correction == "none":
        return {}, []
    if options.bias_correction == "synthetic":
        means = _random_means(plan.checkpoint, options.calibration_samples, options.seed)
        return {layer: -means[weight.shape[1]] for layer, weight in layers.items()}, []
    table = plan.scope.table
    known = {n: t for n, t in layers.items() if table.is_modulation(plan.scope.inner(n))}
    if not table.time_embedder:  # it is in another file
        known = {}
    if not known:
        return {}, sorted(layers)
    timesteps = sampler_timesteps(options.timesteps)
    mean = embedder_outputs(plan.checkpoint, plan.scope.prefix, timesteps).mean(axis=0)
    for layer, weight in known.items():
        if weight.shape[1] != mean.size:
            raise CheckpointError(
                f'{plan.checkpoint.path}: tensor "{layer}.weight" has {weight.shape[1]} columns, '
                f"but {ZIMAGE.time_embedder} gives {mean.size} values",
                'use `bias_correction="none"`',
            )
    return dict.fromkeys(known, mean), sorted(layers.keys() - known.keys())


def _random_means(checkpoint: Checkpoint, samples: int, seed: int) -> dict[int, Vector]:
    """Return the column means of convert_to_quant's random inputs, by number of columns.

    convert_to_quant draws one matrix for each new number of columns, over all 2-D weights in name
    order, from one generator; the mean of its matrix products is the matrix product with the mean.
    """
    with needed("torch", "the synthetic bias correction"):  # for convert_to_quant's random numbers
        import torch
    generator = torch.Generator(device="cpu").manual_seed(seed)
    means: dict[int, Vector] = {}
    for columns in _weight_columns(checkpoint.tensors.values()):
        if columns not in means:
            try:
                drawn: Any = torch.randn(samples, columns, generator=generator, dtype=torch.float32)
            except RuntimeError:
                raise UnsupportedError(
                    f"torch could not draw {samples:,} x {columns:,} random numbers: not enough "
                    "memory",
                    "use a smaller `calibration_samples`",
                ) from None
            means[columns] = drawn.mean(dim=0, dtype=torch.float64).numpy()
    return means


def _weight_columns(tensors: Iterable[SourceTensor]) -> list[int]:
    weights = [t for t in tensors if t.name.endswith(WEIGHT_SUFFIX) and len(t.shape) == 2]
    return [tensor.shape[1] for tensor in sorted(weights, key=lambda t: t.name)]


def to_float64(tensor: SourceTensor, data: npt.NDArray[np.uint8]) -> Vector:
    """Return the values of BF16, F16 or F32 bytes."""
    source = as_integers(tensor.dtype, data).reshape(1, -1)
    target = np.empty(source.shape, np.float32)
    _core.cast(source, FLOAT_NAMES[tensor.dtype], target, "float32", 1)
    with np.errstate(invalid="ignore"):  # NumPy warns of signalling NaN
        return target.reshape(-1).astype(np.float64)


def add_to_bias(
    bias: SourceTensor, data: npt.NDArray[np.uint8], change: Vector
) -> npt.NDArray[np.uint8]:
    """Return a bias's bytes plus a vector, rounded to the bias's type.

    Elements that would leave the type's range keep their value.
    """
    with np.errstate(over="ignore"):
        total = (to_float64(bias, data) + change).astype(np.float32).reshape(1, -1)
    if bias.dtype == "F32":
        changed = total.reshape(-1).view(np.uint8)
    else:
        rounded = np.empty(total.shape, np.uint16)
        _core.cast(total, "float32", rounded, FLOAT_NAMES[bias.dtype], 1)
        changed = rounded.reshape(-1).view(np.uint8)
    finite = np.isfinite(to_float64(bias, changed))
    width = f"u{SAFETENSORS_BITS[bias.dtype] // 8}"
    return np.where(finite, changed.view(width), data.view(width)).view(np.uint8)
