"""The sensitivity analysis: which weights lose most when they are quantised."""

from __future__ import annotations

import csv
import io
import math
import os
from dataclasses import dataclass
from typing import Any

from ...checkpoint import quantization as markers
from ...checkpoint.file_names import base_name
from ...checkpoint.identify import Identified, open_for
from ...checkpoint.scopes import Scope
from ...checkpoint.source import Checkpoint, SourceTensor
from ...checks import check_threads
from ...conversion.options import ConversionOptions
from ...conversion.plan import make_plan
from ...conversion.recipes import Recipe
from ...dtypes import FLOAT_NAMES
from ...errors import CheckpointError, UsageError
from ...layout import padded_shape, scale_shape
from ...printing.progress import byte_bar, shown
from ...streaming.jobs import ProgressCallback
from ...text import plural
from .grouping import ProbedGroup, ProbedTensor, Weight, decide
from .measure import measure
from .recipe import exclusion_regex, probe_recipe
from .scoring import ProbeRules, Thresholds, scores, thresholds

_INFINITE = (math.inf, -math.inf)
CSV_COLUMNS = (
    *("key", "layer_type", "block_idx", "subgraph", "rows", "cols"),
    *("excess_kurtosis", "dynamic_range", "std", "outlier_pct", "aspect_ratio", "score"),
    *("recommendation", "effective_recommendation", "reason"),
)


@dataclass(frozen=True, repr=False)
class ProbeReport:
    """Results of `probe`.

    Attributes:
        path: the checkpoint.
        rules: the numbers that decided.
        thresholds: the scores at the percentiles.
        tensors: every probed weight, by name.
        groups: weights of one type and position, by layer type.
        exclude_layers: regular expression for `convert --exclude-layers` that finds the weights to
            keep; None without such weights.
        recipe: the recipe that keeps them, the embedders and the final layer.
        input_bytes: bytes of all tensors.
        exclude_layers_bytes: bytes of the file that `convert --exclude-layers` would write with its
            default recipe; None if it would refuse, for example because nothing is left to
            quantise.
        recipe_bytes: the same with `recipe`.
    """

    path: str
    rules: ProbeRules
    thresholds: Thresholds
    tensors: list[ProbedTensor]
    groups: list[ProbedGroup]
    exclude_layers: str | None
    recipe: Recipe
    input_bytes: int
    exclude_layers_bytes: int | None
    recipe_bytes: int | None

    def __repr__(self) -> str:
        return f"ProbeReport({self.path!r}, {plural(len(self.tensors), 'weight')})"

    def __str__(self) -> str:
        from ...printing.probe import print_probe
        from ...printing.screen import as_text

        return as_text(lambda screen: print_probe(self, screen))

    def to_dict(self) -> dict[str, Any]:
        """Return the values for JSON, which has no infinity: such a rule is None."""
        return {
            "path": self.path,
            "rules": {k: None if v in _INFINITE else v for k, v in vars(self.rules).items()},
            "thresholds": vars(self.thresholds),
            "tensors": [
                vars(tensor) | {"metrics": vars(tensor.metrics)} for tensor in self.tensors
            ],
            "groups": [vars(group) | {"metrics": vars(group.metrics)} for group in self.groups],
            "exclude_layers": self.exclude_layers,
            "input_bytes": self.input_bytes,
            "exclude_layers_bytes": self.exclude_layers_bytes,
            "recipe_bytes": self.recipe_bytes,
        }

    def to_csv(self) -> str:
        """Return one row per weight, with columns, digits and line ends of quant_probe's CSV."""
        text = io.StringIO()
        rows = csv.writer(text)
        rows.writerow(CSV_COLUMNS)
        for tensor in self.tensors:
            m = tensor.metrics
            rows.writerow(
                [
                    *(tensor.name, tensor.layer_type, tensor.block, tensor.stack, *tensor.shape),
                    *(f"{m.excess_kurtosis:.4f}", f"{m.dynamic_range:.4f}", f"{m.std:.6f}"),
                    *(f"{m.outlier_pct:.2f}", f"{m.aspect_ratio:.2f}", f"{tensor.score:.4f}"),
                    *(tensor.recommendation, tensor.effective, tensor.reason),
                ]
            )
        return text.getvalue()


def probe(
    path: str | os.PathLike[str],
    *,
    rules: ProbeRules | None = None,
    threads: int = 0,
    progress: ProgressCallback | bool | None = None,
) -> ProbeReport:
    """Measure how sensitive each weight of Z-Image's blocks is, and recommend what to keep.

    Metrics are exact in float64. Weights in BF16 and F16 are read once, those in F32 twice; memory
    does not grow with the checkpoint. Scores, groups and recommendations are those of quant_probe.

    Args:
        path: the checkpoint before quantisation: a safetensors file or a diffusers folder in BF16,
            F16 or F32.
        rules: the numbers that decide, by default quant_probe's for Z-Image.
        threads: cores to use; 0 means all.
        progress: called with a `Progress` from this thread; True draws a bar on a terminal.

    Returns:
        A `ProbeReport`.

    Raises:
        UsageError: if `rules` or `threads` have a wrong type or value.
        CheckpointError: unreadable, malformed, quantised already, or without any weight to probe.
        NonFiniteError: a weight has NaN or Inf; the sentence names tensor, row and column.
    """
    check_threads(threads)
    rules = ProbeRules() if rules is None else rules
    if not isinstance(rules, ProbeRules):
        raise UsageError("rules", f"must be ProbeRules, not {type(rules).__name__}")
    found = open_for(path, "analyse")
    checkpoint = found.checkpoint
    targets = _targets(checkpoint, found.scope)
    sources = [tensor for tensor, *_ in targets]
    with shown(progress, byte_bar("probing")) as callback:
        measured = measure(sources, rules.outlier_sigma, threads=threads, progress=callback)
    metrics = [measured[tensor.name] for tensor in sources]
    all_scores = scores(metrics, [kind for _, kind, *_ in targets], rules)
    limits = thresholds(all_scores, rules)
    weights = [
        Weight(
            *(tensor.name, kind, block, stack, _matrix_shape(tensor), _saved(tensor)),
            *(metric, score),
        )
        for (tensor, kind, block, stack), metric, score in zip(
            targets, metrics, all_scores, strict=True
        )
    ]
    tensors, groups = decide(weights, limits, rules)
    regex = exclusion_regex(tensors)
    recipe = probe_recipe(tensors, limits, rules, base_name(path))
    default = ConversionOptions(exclude_layers=[regex] if regex else [])
    return ProbeReport(
        str(path),
        rules,
        limits,
        tensors,
        groups,
        regex,
        recipe,
        checkpoint.nbytes,
        _converted_size(found, default),
        _converted_size(found, ConversionOptions(recipe=recipe)),
    )


Target = tuple[SourceTensor, str, int, str]  # with its layer type, block and stack


def _targets(checkpoint: Checkpoint, scope: Scope) -> list[Target]:
    """Return the weights to probe, by name."""
    table = scope.table
    types = table.layer_types()
    targets: list[Target] = []
    for name, tensor in sorted(checkpoint.tensors.items()):
        if name not in scope or not name.endswith(markers.WEIGHT_SUFFIX) or len(tensor.shape) != 2:
            continue
        at = table.split(scope.inner(name).removesuffix(markers.WEIGHT_SUFFIX))
        if at is None or (kind := table.layer_type(at)) not in types:
            continue
        if tensor.dtype not in FLOAT_NAMES:
            raise CheckpointError(
                f'{checkpoint.path}: tensor "{name}" is {tensor.dtype}; only BF16, F16 and F32 '
                "weights can be probed: convert it first"
            )
        if tensor.nbytes == 0:
            raise CheckpointError(
                f'{checkpoint.path}: tensor "{name}" is empty; download the checkpoint again'
            )
        targets.append((tensor, kind, at.block, at.stack))
    if not targets:
        raise CheckpointError(
            f"{checkpoint.path} has no weight to probe: no name is like those of Z-Image's "
            f'blocks, such as "{scope.prefix}{table.main.name}.0.{table.block[0].weight}"',
            "name the file of a transformer",
        )
    return targets


def _matrix_shape(tensor: SourceTensor) -> tuple[int, int]:
    rows, cols = tensor.shape
    return rows, cols


def _saved(tensor: SourceTensor) -> int:
    codes, scales = (f(_matrix_shape(tensor)) for f in (padded_shape, scale_shape))
    return tensor.nbytes - math.prod(codes) - math.prod(scales)


def _converted_size(source: Identified, options: ConversionOptions) -> int | None:
    try:
        return make_plan(source, options).size
    except CheckpointError:  # for example, the recipe keeps all: there would be no file
        return None
