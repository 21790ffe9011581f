"""The whole analysis: every layer, every group, the ranking and the smallest set."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ...checkpoint.output import check_target
from ...conversion.recipes import Recipe, load_recipe
from ...errors import CheckpointError, UsageError
from ...printing.progress import analysis_bar, shown
from ...streaming.jobs import StageCallback, StageProgress
from ...text import plural
from ...transformer.compute import Compute
from ...transformer.floating_dtype import name_of
from ...transformer.model import ZImageTransformer
from ...transformer.model_file import ModelFile, open_model
from ...zimage.config import ZImageConfig
from ...zimage.layers import ZIMAGE
from ...zimage.table import LayerTable
from .cases import Case, record_cases
from .measure import OutputError, mean_error, measure
from .salience import Salience, measure_salience
from .search import by_worth, smallest_prefix
from .settings import check_settings
from .state import State
from .targets import Target, find_targets

CARD = "uniform"  # the recipe of the model card, for comparison


@dataclass(frozen=True)
class Measured:
    """Effect of quantising one layer or group on the output.

    Attributes:
        name: name of the layer or group.
        layers: number of layers.
        saved: bytes that quantising it saves, against BF16.
        error: squared error of the output relative to its energy, mean over timesteps.
        by_step: (step, the same) of each timestep.
    """

    name: str
    layers: int
    saved: int
    error: OutputError
    by_step: tuple[tuple[int, OutputError], ...]


@dataclass(frozen=True)
class Choice:
    """A set of layers to keep in BF16, with the resulting size and error.

    Attributes:
        name: name of the set.
        kept: names of the layers that are kept.
        nbytes: resulting bytes of the transformer's tensors.
        error: relative error of the output (norm of the difference over that of the output): the
            root of the relative squared error, which is the mean over timesteps.
    """

    name: str
    kept: tuple[str, ...]
    nbytes: int
    error: float


@dataclass(frozen=True)
class Conditions:
    """What the model was measured with.

    Attributes:
        compute: the compute mode that layers are rounded for.
        size: height and width of the images in pixels.
        captions: number of captions, one image each.
        seed: of the noise and of synthetic captions.
        device: that the model ran on.
        dtype: of the model.
    """

    compute: Compute
    size: tuple[int, int]
    captions: int
    seed: int
    device: str
    dtype: str


@dataclass(frozen=True, repr=False)
class SensitivityReport:
    """Results of the analysis.

    Attributes:
        path: the checkpoint.
        bound: the requested relative error of the output.
        layers: each quantised alone, the most harmful for its size first.
        groups: each quantised alone.
        salience: salience of each layer except modulations, by name.
        smallest: the smallest choice within the bound.
        everything: all layers quantised.
        card: the model card's exclusions.
        tried: the sets that were measured on the way to the smallest, fewest layers first.
        conditions: what the model was measured with.
    """

    path: str
    bound: float
    layers: tuple[Measured, ...]
    groups: tuple[Measured, ...]
    salience: dict[str, Salience]
    smallest: Choice
    everything: Choice
    card: Choice
    tried: tuple[Choice, ...]
    conditions: Conditions

    def __repr__(self) -> str:
        layers = plural(len(self.layers), "layer")
        return f"SensitivityReport({self.path!r}, {layers}, bound {self.bound:g})"

    def __str__(self) -> str:
        from ...printing.screen import as_text
        from ...printing.sensitivity import print_sensitivity

        return as_text(lambda screen: print_sensitivity(self, screen))

    def to_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        return asdict(self)


def analyse_sensitivity(
    path: str | os.PathLike[str],
    *,
    captions: Sequence[torch.Tensor] | None = None,
    bound: float = 0.05,
    size: tuple[int, int] = (512, 512),
    timesteps: int = 4,
    seed: int = 0,
    compute: str = "mxfp8",
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.bfloat16,
    state: str | os.PathLike[str] | None = None,
    progress: StageCallback | bool | None = None,
) -> SensitivityReport:
    """Measure the effect of quantising each layer to MXFP8 on the transformer's output.

    Weights and activations are rounded as a compute mode rounds them, one layer or group at a time,
    at several timesteps of a sampling run of the original model.

    Args:
        path: a plain checkpoint, as `ZImageTransformer.from_checkpoint` takes it.
        captions: caption features [tokens, features] of real prompts; by default two synthetic
            ones, which are less representative.
        bound: relative error of the output that the smallest set of exclusions has to hold.
        size: height and width of the images, multiples of 16 up to 8192.
        timesteps: number of the 8 steps of Turbo's sampler to measure at.
        seed: seed of the noise and of synthetic captions.
        compute: the compute mode that the MXFP8 file will run in: "mxfp8", "fp8", "weight-only" or
            "int8". Decoded numbers are multiplied, so that any device can measure any mode.
        device: as for `ZImageTransformer.from_checkpoint`.
        dtype: dtype of the model: bfloat16, or float32 to exclude its own rounding from the errors.
        state: a JSON file to keep measurements in, so that an interrupted run can go on.
        progress: called when a stage begins, and after each measurement; True draws a bar on a
            terminal, and prints lines to stderr elsewhere.

    Raises:
        CheckpointError: the model cannot be loaded, or its output is NaN, infinite or zero.
        CudaError: the device has too little memory.
        UsageError: the model is quantised already, an argument is invalid, or `state` is of another
            run.
        OutputError: `state` cannot be written.
    """
    settings = check_settings(bound, size, timesteps, seed, compute)
    if dtype not in (torch.bfloat16, torch.float32):
        problem = f"must be torch.bfloat16 or torch.float32, not {repr(dtype)[:80]}"
        raise UsageError("dtype", problem)
    file = open_model(path, "measure")
    if captions is None:
        captions = _synthetic_captions(file.config.cap_feat_dim, settings.seed)
    _check_captions(captions, file.config.cap_feat_dim)
    run = {
        "checkpoint": _fingerprint(file),
        "compute mode": settings.compute,
        "size": list(settings.size),
        "timesteps": settings.timesteps,
        "seed": settings.seed,
        "dtype": str(dtype),
        "captions": [[*caption.shape, float(caption.double().sum())] for caption in captions],
    }
    if state is not None:
        check_target(Path(state), file.checkpoint.inputs, overwrite=True, argument="state")
    memory = State(None if state is None else Path(state), run)
    with shown(progress, analysis_bar) as callback:
        report = callback or (lambda _: None)
        report(StageProgress("loading the model", "", 0, 0))
        model = ZImageTransformer.from_checkpoint(path, device, dtype=dtype, cuda_graphs=False)
        report(StageProgress("running the original model", "", 0, 0))
        cases = record_cases(model, captions, settings.size, settings.timesteps, settings.seed)
        _check_outputs(path, cases)
        conditions = Conditions(
            compute=settings.compute,
            size=settings.size,
            captions=len(captions),
            seed=settings.seed,
            device=str(model.device),
            dtype=name_of(dtype),
        )
        analysis = _Analysis(
            str(path), file, model, cases, memory, settings.bound, conditions, report
        )
        return analysis.run()


def _check_captions(captions: Any, features: int) -> None:
    if not isinstance(captions, (list, tuple)) or not captions:
        raise UsageError("captions", f"must be a list of tensors [tokens, {features}]")
    for i, caption in enumerate(captions):
        is_tensor = isinstance(caption, torch.Tensor) and caption.is_floating_point()
        if not is_tensor or caption.dim() != 2 or caption.shape[1] != features or not len(caption):
            found = (
                f"{caption.dtype} {list(caption.shape)}" if is_tensor else type(caption).__name__
            )
            raise UsageError(
                "captions",
                f"must be floating-point tensors [tokens, {features}] with one token at least, but "
                f"number {i} is {found}",
            )
        if not caption.isfinite().all():
            raise UsageError("captions", f"must be finite, but number {i} has NaN or Inf")


def _check_outputs(path: str | os.PathLike[str], cases: Sequence[Case]) -> None:
    """Check that the model's own output is finite and not zero: errors are relative to it."""
    for case in cases:
        is_finite = all(velocity.isfinite().all() for velocity in case.velocities)
        if is_finite and any(velocity.any() for velocity in case.velocities):
            continue
        found = "is zero" if is_finite else "has NaN or Inf"
        raise CheckpointError(
            f"{path}: the model's own output {found} at step {case.step}, so errors cannot be "
            "measured against it; download the checkpoint again"
        )


class _Analysis:
    def __init__(
        self,
        path: str,
        file: ModelFile[ZImageConfig],
        model: ZImageTransformer,
        cases: Sequence[Case],
        memory: State,
        bound: float,
        conditions: Conditions,
        progress: StageCallback,
    ) -> None:
        self._path, self._file, self._model, self._cases = path, file, model, cases
        self._memory, self._bound, self._conditions = memory, bound, conditions
        self._progress, self._stage = progress, ""
        self._targets = find_targets(model)
        self._groups = groups_of(self._targets)
        # Bisection measures about log2(layers) sets.
        rest = len(self._targets).bit_length() + 3
        self._total, self._done = len(self._targets) + len(self._groups) + rest, 0

    def run(self) -> SensitivityReport:
        self._begin("measuring each layer alone")
        alone = {target.name: self._measured(target.name, [target]) for target in self._targets}
        self._begin("measuring groups of layers")
        groups = [self._measured(f"group {name}", group) for name, group in self._groups.items()]
        self._begin("looking at channels")
        salience = measure_salience(self._model, self._targets, self._cases)
        self._begin("looking for the smallest set to keep")
        order = by_worth(self._targets, lambda target: alone[target.name].error.total)
        tried: dict[int, Choice] = {}

        def error_without(kept: int) -> float:
            tried[kept] = self._choice(f"{kept} kept", order[:kept])
            return tried[kept].error

        kept, _ = smallest_prefix(len(order), error_without, self._bound)
        card = load_recipe(CARD)
        report = SensitivityReport(
            path=self._path,
            bound=self._bound,
            layers=tuple(alone[target.name] for target in order),
            groups=tuple(groups),
            salience=salience,
            smallest=self._choice("smallest", order[:kept]),
            everything=self._choice("everything", []),
            card=self._choice(CARD, [t for t in self._targets if _keeps(card, t)]),
            tried=tuple(tried[k] for k in sorted(tried)),
            conditions=self._conditions,
        )
        self._done = self._total
        self._begin("done")
        return report

    def _begin(self, stage: str) -> None:
        self._stage = stage
        self._progress(StageProgress(stage, "", self._done, self._total))

    def _errors(self, name: str, targets: Sequence[Target]) -> list[OutputError]:
        errors = self._memory.errors(name, lambda: self._measure(name, targets))
        self._done = min(self._done + 1, self._total)
        self._progress(StageProgress(self._stage, name, self._done, self._total))
        return errors

    def _measure(self, name: str, targets: Sequence[Target]) -> list[OutputError]:
        errors = measure(self._model, targets, self._cases, self._conditions.compute)
        if not all(math.isfinite(error.total) for error in errors):
            raise CheckpointError(
                f"{self._path}: the output has NaN or Inf with {name[:80]} quantised: weights near "
                "float32's limit are damaged; download the checkpoint again"
            )
        return errors

    def _measured(self, name: str, targets: Sequence[Target]) -> Measured:
        errors = self._errors(name, targets)
        steps = [case.step for case in self._cases]
        return Measured(
            name.removeprefix("group "),
            len(targets),
            sum(target.saved for target in targets),
            mean_error(errors),
            tuple(zip(steps, errors, strict=True)),
        )

    def _choice(self, name: str, kept: Sequence[Target]) -> Choice:
        """Measure with all layers quantised except the kept ones."""
        names = {target.name for target in kept}
        rounded = [target for target in self._targets if target.name not in names]
        key = "all but " + " ".join(sorted(names))
        error = math.sqrt(mean_error(self._errors(key, rounded)).total) if rounded else 0.0
        whole = self._file.nbytes(torch.bfloat16.itemsize)
        nbytes = whole - sum(target.saved for target in rounded)
        return Choice(name, tuple(sorted(names)), nbytes, error)


def groups_of(targets: Sequence[Target], table: LayerTable = ZIMAGE) -> dict[str, list[Target]]:
    """Return kinds of layers, and main blocks by depth: first and last tenth, middle."""
    groups: dict[str, list[Target]] = {}
    blocks = 1 + max((t.block for t in targets if t.stack == table.main.name), default=-1)
    edge = max(round(blocks / 10), 1)
    for target in targets:
        names = [target.kind.split(".")[0]]
        if target.stack != table.main.name:
            names = [target.stack]
        elif target.block < edge:
            names.append("first blocks")
        elif target.block >= blocks - edge:
            names.append("last blocks")
        else:
            names.append("middle blocks")
        for name in names:
            groups.setdefault(name, []).append(target)
    return groups


def _keeps(recipe: Recipe, target: Target) -> bool:
    return any(rule.matches(target.name + ".weight", "") for rule in recipe.keep)


def _synthetic_captions(features: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed + 1)
    return [torch.randn(tokens, features, generator=generator) for tokens in (32, 77)]


def _fingerprint(file: ModelFile[ZImageConfig]) -> list[Any]:
    """Return the identity of a checkpoint: names, sizes and times of its files."""
    stats = [(path.name, path.stat()) for path in file.checkpoint.files]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
