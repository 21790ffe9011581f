"""The sensitivity analysis against torch, written down once more from quant_probe's formulas."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import zimage_mxfp8 as zm
from helpers.checkpoints import PREFIX, Tensors, random_tensors, small_shapes, to_diffusers
from helpers.commands import Run, fails, only
from helpers.terminal import first_column, tables_in_terminal
from zimage_mxfp8 import _core
from zimage_mxfp8.analysis.probe.weight_metrics import (
    Moments,
    WeightMetrics,
    count_outliers,
    metrics_of_counts,
    moments_of,
    pattern_values,
)

Row = dict[str, str]
REASONS = {
    "kurtosis_floor",
    "score_percentile",
    "score_below_fp8_min",
    "default",
    "group_keep_resolved",
    "group_fp8_promotion",
    "group_spread_demotion",
    "spread_demotion",
}


# ---- the reference

MAIN = {
    f"{part}.{name}"
    for part, names in {"attention": ("qkv", "out"), "feed_forward": ("w1", "w2", "w3")}.items()
    for name in names
}


def reference_metrics(weight: torch.Tensor, sigma: float) -> dict[str, float]:
    x = weight.float().flatten()
    mean, std = x.mean(), x.std()
    deviation = x - mean
    return {
        "excess_kurtosis": ((deviation**4).mean() / std**4 - 3).item() if std > 0 else 0.0,
        "dynamic_range": (x.abs().max() - x.abs().min()).item(),
        "std": std.item(),
        "outlier_pct": ((deviation.abs() > sigma * std).float().mean() * 100).item(),
        "aspect_ratio": max(weight.shape) / min(weight.shape),
    }


def reference_csv(tensors: Tensors, *, fp8_min: float = 0.0, sigma: float = 3.0) -> list[Row]:
    """The rows that quant_probe writes for Z-Image with its two attention types exempt."""
    found = []
    for name in sorted(tensors):
        stack, *rest = name.removeprefix(PREFIX).removesuffix(".weight").split(".")
        kind = ".".join(rest[1:])
        kinds = MAIN | {"adaLN_modulation.0"} if stack == "layers" else MAIN
        if not name.endswith(".weight") or kind not in kinds:
            continue
        block = rest[0]
        label = kind if stack == "layers" else f"{stack}.{kind}"
        figures = reference_metrics(tensors[name], sigma)
        found.append((name, label, int(block), stack, tuple(tensors[name].shape), figures))

    quantile = lambda values, q: torch.quantile(torch.tensor(values), q).item()  # noqa: E731
    kurtosis = [figures["excess_kurtosis"] for *_, figures in found]
    q1, q3 = quantile(kurtosis, 0.25), quantile(kurtosis, 0.75)
    fence = (q1 - 1.5 * (q3 - q1), q3 + 1.5 * (q3 - q1))

    def within_type(label: str, key: str, value: float) -> float:
        values = [f[key] for _, other, *_, f in found if other == label]
        spread = max(values) - min(values)
        return (value - min(values)) / spread if spread > 0 else 0.0

    scores = []
    for _, label, *_, f in found:
        clipped = min(max(f["excess_kurtosis"], fence[0]), fence[1])
        n_kurt = (clipped - fence[0]) / (fence[1] - fence[0]) if fence[1] > fence[0] else 0.0
        n_range = within_type(label, "dynamic_range", f["dynamic_range"])
        n_ar = within_type(label, "aspect_ratio", f["aspect_ratio"])
        scores.append(0.6 * n_kurt + 0.3 * n_range + 0.1 * n_ar)
    fp8_from, keep_from = quantile(scores, 0.5), quantile(scores, 0.9)

    def rule(score: float, kurt: float) -> tuple[str, str]:
        if kurt >= 8:
            return "*KEEP*", "kurtosis_floor"
        if score >= keep_from:
            return "*KEEP*", "score_percentile"
        if score >= fp8_from:
            enough = score >= fp8_min
            return ("FP8", "score_percentile") if enough else ("NVFP4", "score_below_fp8_min")
        return "NVFP4", "default"

    blocks = 1 + max(block for _, _, block, stack, *_ in found if stack == "layers")
    edge = max(1, round(blocks / 10))

    def third(block: int) -> int:
        return 0 if block < edge else (2 if block >= blocks - edge else 1)

    rows = []
    for (name, label, block, stack, shape, f), score in zip(found, scores, strict=True):
        own, reason = rule(score, f["excess_kurtosis"])
        effective = own
        if stack == "layers" and not label.startswith("attention"):
            peers = [
                (third(b), s, g["excess_kurtosis"])
                for (_, other, b, *_, g), s in zip(found, scores, strict=True)
                if other == label
            ]
            means = [
                float(np.mean([s for t, s, _ in peers if t == part]))
                for part in sorted({t for t, *_ in peers})
            ]
            mine = [(s, k) for t, s, k in peers if t == third(block)]
            group = rule(float(np.mean([s for s, _ in mine])), max(k for _, k in mine))[0]
            if max(means) - min(means) < 0.2 and group != "NVFP4":
                effective = {"FP8": "NVFP4", "*KEEP*": "FP8"}[group]
                reason = "spread_demotion"
            elif group == "*KEEP*":
                reason = reason if own == "*KEEP*" else "group_keep_resolved"
            elif group != own:
                promoted = group == "FP8" and own == "NVFP4"
                reason = "group_fp8_promotion" if promoted else "group_spread_demotion"
                effective = group
        rows.append(
            {
                "key": name,
                "layer_type": label,
                "block_idx": str(block),
                "subgraph": stack,
                "rows": str(shape[0]),
                "cols": str(shape[1]),
                "excess_kurtosis": f"{f['excess_kurtosis']:.4f}",
                "dynamic_range": f"{f['dynamic_range']:.4f}",
                "std": f"{f['std']:.6f}",
                "outlier_pct": f"{f['outlier_pct']:.2f}",
                "aspect_ratio": f"{f['aspect_ratio']:.2f}",
                "score": f"{score:.4f}",
                "recommendation": own,
                "effective_recommendation": effective,
                "reason": reason,
            }
        )
    return rows


def assert_same_csv(text: str, expected: list[Row]) -> None:
    """Equal up to one unit of the last printed digit, or of float32's last: torch sums in it."""
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert text.endswith("\r\n") and list(rows[0]) == list(expected[0])
    assert [row["key"] for row in rows] == [row["key"] for row in expected]
    for row, want in zip(rows, expected, strict=True):
        for column, value in want.items():
            digits = len(value.partition(".")[2])
            if column in ("excess_kurtosis", "dynamic_range", "std", "outlier_pct", "score"):
                assert len(row[column].partition(".")[2]) == digits
                most = 1.5 * 10**-digits + 5e-7 * abs(float(value))
                assert abs(float(row[column]) - float(value)) < most, (column, want, row)
            else:
                assert row[column] == value, (column, want, row)


# ---- a checkpoint in which everything occurs


def plant(tensors: Tensors, name: str, factor: float, count: int = 2) -> None:
    """Make some elements of a weight outliers."""
    flat = tensors[name].view(-1)
    flat[:: flat.numel() // count] *= factor
    flat[0] = factor * 0.05


@pytest.fixture(scope="module")
def planted() -> Tensors:
    tensors = random_tensors(small_shapes())
    for block in range(30):
        # Sensitivity that rises with depth, and one that is the same everywhere.
        plant(tensors, f"layers.{block}.feed_forward.w2.weight", 1 + block / 12, 60)
        plant(tensors, f"layers.{block}.feed_forward.w3.weight", 5, 20)
    for block in range(3, 30, 2):  # every other one
        plant(tensors, f"layers.{block}.feed_forward.w1.weight", 3, 40)
    plant(tensors, "layers.0.feed_forward.w1.weight", 40)
    plant(tensors, "layers.29.adaLN_modulation.0.weight", 20)
    plant(tensors, "layers.3.attention.qkv.weight", 60)
    plant(tensors, "context_refiner.1.attention.out.weight", 15)
    return tensors


@pytest.fixture(scope="module")
def planted_file(planted: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("probe") / "planted.safetensors"
    save_file(planted, path)
    return path


def test_csv_equals_the_reference_in_every_case(planted: Tensors, planted_file: Path) -> None:
    reasons, effects = set(), set()
    for fp8_min in (0.0, 0.5):
        report = zm.probe(planted_file, rules=zm.ProbeRules(fp8_min_score=fp8_min))
        expected = reference_csv(planted, fp8_min=fp8_min)
        assert len(expected) == 200
        assert_same_csv(report.to_csv(), expected)
        reasons |= {row["reason"] for row in expected}
        effects |= {row["effective_recommendation"] for row in expected}
        effects |= {row["recommendation"] for row in expected}
    assert reasons == REASONS
    assert effects == {"*KEEP*", "FP8", "NVFP4"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_csv_of_other_types(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {PREFIX + n: t for n, t in random_tensors(small_shapes(3), dtype, 1).items()}
    # More than one chunk.
    large = PREFIX + "layers.1.feed_forward.w1.weight"
    tensors[large] = torch.randn(4100, 2100, generator=torch.manual_seed(2)).to(dtype)
    save_file(tensors, tmp_path / "a.safetensors")
    rules = zm.ProbeRules(outlier_sigma=2.5)
    report = zm.probe(tmp_path / "a.safetensors", rules=rules, threads=3)
    assert_same_csv(report.to_csv(), reference_csv(tensors, sigma=2.5))
    assert report == zm.probe(tmp_path / "a.safetensors", rules=rules, threads=1)


def test_diffusers_folders_have_the_same_figures(
    small_model: Tensors, small_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "transformer"
    folder.mkdir()
    save_file(to_diffusers(small_model), folder / "diffusion_pytorch_model.safetensors")
    assert zm.probe(folder).to_csv() == zm.probe(small_file).to_csv()


def test_weights_of_one_value(in_process: Run, tmp_path: Path) -> None:
    shapes = {n: s for n, s in small_shapes(1).items() if not re.match("noise.*adaLN", n)}
    save_file({n: torch.full(s, 0.5) for n, s in shapes.items()}, tmp_path / "a.safetensors")
    report = zm.probe(tmp_path / "a.safetensors", rules=zm.ProbeRules(min_group_spread=0))
    figures = report.tensors[0].metrics
    assert (figures.excess_kurtosis, figures.dynamic_range, figures.std) == (0, 0, 0)
    assert {tensor.score for tensor in report.tensors} == {0}
    assert {t.effective for t in report.tensors} == {"*KEEP*"}, "all reach every percentile"
    assert report.recipe_bytes is None and report.exclude_layers_bytes is None
    result = in_process("probe", "a.safetensors", "--min-group-spread", 0, "--html", "a.html")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("would be refused.") == 2


# ---- metrics

FINITE = np.flatnonzero(np.isfinite(pattern_values("bfloat16"))).astype(np.uint16)


def float64_metrics(values: npt.NDArray[np.float64], sigma: float) -> WeightMetrics:
    deviation = values - values.mean()
    std = values.std(ddof=1) if values.size > 1 else 0.0
    return WeightMetrics(
        float((deviation**4).mean() / std**4 - 3) if std else 0.0,
        float(np.abs(values).max() - np.abs(values).min()),
        float(std),
        float(100 * (np.abs(deviation) > sigma * std).mean()),
        float(values.size),
    )


def assert_close(found: WeightMetrics, expected: WeightMetrics) -> None:
    for name, value in vars(expected).items():
        scale = expected.excess_kurtosis + 3 if name == "excess_kurtosis" else value
        assert math.isclose(vars(found)[name], value, rel_tol=1e-9, abs_tol=1e-9 * scale), name


@given(
    # From 2^-60 to 2^60: numpy's own fourth powers are exact enough there.
    st.lists(st.integers(67 * 128, 187 * 128), min_size=1, max_size=300),
    st.booleans(),
    st.sampled_from([1.0, 2.5, 3.0]),
)
@settings(deadline=None)
def test_metrics_of_counts(patterns: list[int], signs: bool, sigma: float) -> None:
    bits = np.array(patterns, np.uint16)
    bits[::2] |= 0x8000 if signs else 0
    counts = np.bincount(bits, minlength=65536).astype(np.uint64)
    values = (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    found = metrics_of_counts(counts, "bfloat16", (1, bits.size), sigma)
    assert_close(found, float64_metrics(values, sigma))


@given(st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=2, max_size=300), st.data())
@settings(deadline=None)
def test_merged_moments(numbers: list[float], data: st.DataObject) -> None:
    values = np.array(numbers, np.float32)
    values[np.abs(values) < 2.0**-60] = 0
    split = data.draw(st.integers(1, values.size - 1))
    whole = moments_of(values[:split]).merge(moments_of(values[split:]))
    outliers = count_outliers(values, whole.mean, 2.5 * whole.std)
    expected = float64_metrics(values.astype(np.float64), 2.5)
    found = whole.metrics((1, values.size), outliers)
    assert math.isclose(found.std, expected.std, rel_tol=1e-9, abs_tol=1e-9 * np.abs(values).max())
    assert found.dynamic_range == expected.dynamic_range
    if expected.std > 1e-3 * np.abs(values).max():  # else both are rounding errors
        assert math.isclose(found.excess_kurtosis, expected.excess_kurtosis, abs_tol=1e-6)


def test_many_blocks_of_moments() -> None:
    values = np.random.default_rng(0).standard_exponential(300_000).astype(np.float32) + 5
    sums = moments_of(values)
    assert isinstance(sums, Moments)
    found = sums.metrics((1, values.size), count_outliers(values, sums.mean, 3 * sums.std))
    assert_close(found, float64_metrics(values.astype(np.float64), 3))


def test_float16_values() -> None:
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    want = patterns.view(torch.float16).double().numpy()
    np.testing.assert_array_equal(pattern_values("float16"), want)


# ---- the core's operation


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (3, 7), (129, 513), (1100, 1024)])
@pytest.mark.parametrize("threads", [1, 3])
def test_count_bit_patterns(cpu_target: str, shape: tuple[int, int], threads: int) -> None:
    random = np.random.default_rng(1)
    stored = random.integers(0, 65536, (shape[0], shape[1] + 3), np.uint16)
    stored[: shape[0] // 2] &= 3  # few patterns: neighbours are equal
    matrix = stored[:, : shape[1]]
    counts = np.full(65536, 7, np.uint64)
    for dtype in ("bfloat16", "float16"):
        _core.count_bit_patterns(matrix, dtype, counts, threads)
    want = 2 * np.bincount(matrix.reshape(-1), minlength=65536).astype(np.uint64) + 7
    np.testing.assert_array_equal(counts, want)


def test_count_bit_patterns_checks_its_arguments() -> None:
    counts = np.zeros(65536, np.uint64)
    with pytest.raises(zm.InvalidArgumentError, match="16-bit elements only"):
        _core.count_bit_patterns(np.zeros((2, 2), np.uint32), "float32", counts)
    with pytest.raises(zm.InvalidArgumentError, match="counts"):
        _core.count_bit_patterns(np.zeros((2, 2), np.uint16), "float16", counts[1:])
    with pytest.raises(zm.InvalidArgumentError, match="2 dimensions"):
        _core.count_bit_patterns(np.zeros(2, np.uint16), "float16", counts)


# ---- what follows from the recommendations


def kept_by(plan: zm.Plan) -> set[str]:
    return {n for n, p in plan.tensors.items() if p.action == "keep" and p.source.shape[1:]}


def test_convert_takes_the_exclusions_and_the_recipe(
    in_process: Run, planted_file: Path, tmp_path: Path
) -> None:
    result = in_process("probe", planted_file, "--write-recipe", "r.toml", "--csv", "p.csv")
    assert result.returncode == 0, result.stderr
    report = zm.probe(planted_file)
    assert (tmp_path / "p.csv").read_bytes() == report.to_csv().encode()
    keep = {tensor.name for tensor in report.tensors if tensor.effective == "*KEEP*"}
    assert {"layers.3.attention.qkv.weight", "context_refiner.1.attention.out.weight"} < keep
    commands = [line for line in result.stdout.splitlines() if line.startswith("zimage-mxfp8")]
    for command, nbytes in zip(
        commands, (report.exclude_layers_bytes, report.recipe_bytes), strict=True
    ):
        assert f"would write exactly {nbytes:,} bytes" in result.stdout
        words = shlex.split(command)[1:]
        words[words.index("-o") + 1] = "o.safetensors"  # not beside the input, which is shared
        done = in_process(*words, "--overwrite")
        assert done.returncode == 0 and done.stderr == "", done.stderr
        assert (tmp_path / "o.safetensors").stat().st_size == nbytes
        stored = load_file(tmp_path / "o.safetensors")
        assert all(stored[name].dtype == torch.bfloat16 for name in keep)
    probed = {tensor.name for tensor in report.tensors}
    assert (
        kept_by(zm.plan_conversion(planted_file, zm.ConversionOptions(recipe=tmp_path / "r.toml")))
        & probed
        == keep
    )
    rules = zm.load_recipe(tmp_path / "r.toml").keep
    assert [rule.name for rule in rules][-2:] == ["embedders", "final layer"]
    reasons = {rule.name: rule.reason for rule in rules}
    tensor = next(t for t in report.tensors if t.name == "layers.3.attention.qkv.weight")
    kurtosis = f"{tensor.metrics.excess_kurtosis:.4f}"
    assert reasons["layers.3.attention.qkv"] == (
        f"kurtosis_floor: excess kurtosis {kurtosis}, from 8 on"
    )


def test_json(in_process: Run, planted_file: Path) -> None:
    result = in_process("probe", planted_file, "--json", "--kurtosis-keep", "inf")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout, parse_constant=pytest.fail)
    assert document["rules"]["kurtosis_keep"] is None and document["rules"]["ar_weight"] == 0.1
    assert len(document["tensors"]) == 200 and len(document["groups"]) == 6 * 3 + 10
    assert "kurtosis_floor" not in result.stdout
    always = in_process("probe", planted_file, "--json", "--kurtosis-keep=-inf")
    document = json.loads(always.stdout, parse_constant=pytest.fail)
    assert {tensor["reason"] for tensor in document["tensors"]} >= {"kurtosis_floor"}
    first = document["tensors"][0]
    assert first["metrics"]["aspect_ratio"] == 1 and first["shape"] == [40, 40]


def test_nothing_to_keep(in_process: Run, small_file: Path) -> None:
    result = in_process(
        *("probe", small_file, "--keep-percentile", 100, "--spread-filter-exempt"),
        *("--min-group-spread", 9, "--kurtosis-weight", 0, "--range-weight", 0, "--ar-weight", 1),
    )
    assert result.returncode == 0, result.stderr
    # All scores are the same, 0, and reach the percentile; but every main type is low-spread.
    report = zm.probe(
        small_file,
        rules=zm.ProbeRules(
            keep_percentile=100,
            spread_filter_exempt=(),
            min_group_spread=9,
            kurtosis_weight=0,
            range_weight=0,
            ar_weight=1,
        ),
    )
    effects = {tensor.effective for tensor in report.tensors if tensor.stack == "layers"}
    assert effects == {"FP8"}
    assert report.exclude_layers is not None and "layers" not in report.exclude_layers


def test_a_part_of_the_model_is_refused(in_process: Run, tmp_path: Path) -> None:
    tensors = {f"layers.{i}.feed_forward.w1.weight": torch.randn(64, 32) for i in range(3)}
    save_file(tensors, tmp_path / "a.safetensors")
    fails(in_process("probe", "a.safetensors"), 1, 'it lacks "cap_embedder.1.weight"')


def test_blocks_that_are_numbered_otherwise(in_process: Run, tmp_path: Path) -> None:
    """A recipe that named them by number would keep another block, or none."""
    tensors = random_tensors(small_shapes(2))
    known = {tensor.name for tensor in zm.probe(write(tensors, tmp_path / "a.safetensors")).tensors}
    for number in ("007", "\u0663", "9" * 5000, "-1"):
        name = f"layers.{number}.attention.out.weight"
        report = zm.probe(write(tensors | {name: torch.randn(40, 40)}, tmp_path / "a.safetensors"))
        assert {tensor.name for tensor in report.tensors} == known
        assert in_process("inspect", "a.safetensors").returncode == 0


def test_what_convert_would_refuse_for_other_reasons(in_process: Run, tmp_path: Path) -> None:
    name = "layers.0.extra.weight"
    tensors = random_tensors(small_shapes(1)) | {name: torch.zeros(2, 2)}
    report = zm.probe(write(tensors, tmp_path / "a.safetensors"))
    assert report.recipe_bytes is None and report.exclude_layers_bytes is None
    result = in_process("probe", "a.safetensors", "--write-recipe", "r.toml")
    assert result.returncode == 0 and "nothing" not in result.stdout
    planned = in_process("convert", "-i", "a.safetensors", "--recipe", "r.toml", "--dry-run")
    fails(planned, 1, f'"{name}" is not a weight of Z-Image')


def test_table_fits_80_columns(planted_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(planted_file.parent)
    groups = zm.probe(planted_file).groups
    assert any(group.spread_filtered for group in groups)
    (table,), text = tables_in_terminal(["probe", planted_file.name], 80)
    assert first_column(table) == [group.layer_type for group in groups]
    assert table[0] == ["layer type", "blocks", "recommended", "score", "kurtosis"]
    for row, group in zip(table[1:], groups, strict=True):
        assert row[2].startswith(group.recommendation)
        assert ("->" in row[2]) == group.spread_filtered
    assert "--json and wider terminals also show: largest, range, std, outliers (%)." in text
    (wide,), text = tables_in_terminal(["probe", planted_file.name], 160)
    assert [row[:5] for row in wide] == table and "wider terminals" not in text
    assert wide[0][5:] == ["largest", "range", "std", "outliers (%)"]


def write(tensors: Tensors, path: Path) -> Path:
    save_file(tensors, path)
    return path


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["none.safetensors"], 1, "none.safetensors does not exist"),
        (["--kurtosis-weight", "0.7"], 2, "must sum to 1, but they sum to 1.1"),
        (["--range-weight=-1"], 2, "--range-weight must be from 0 to 1, not -1"),
        (["--keep-percentile", "101"], 2, "--keep-percentile must be from 0 to 100"),
        (["--outlier-sigma", "nan"], 2, "--outlier-sigma must be 0 or more, not nan"),
        (["--kurtosis-keep", "nan"], 2, "--kurtosis-keep must be a number"),
        (["--spread-filter-exempt", "attention.q"], 2, 'the unknown layer type "attention.q"'),
        (["--csv", "there.csv"], 1, "there.csv exists; --overwrite"),
        (["--html", "none/a.html"], 1, "none does not exist"),
        (
            ["--csv", "a", "--write-recipe", "./a"],
            2,
            "and another output are the same file, a; give each",
        ),
        (["--csv", "link", "--html", "target"], 2, "and another output are the same file"),
        (["--csv", ""], 2, "argument --csv: the name is empty; name a file"),
        (["--csv", "in.safetensors", "--overwrite"], 2, "in.safetensors is the input"),
        (["--threads", "-1"], 2, "--threads"),
        (["--csv", "folder/"], 2, "folder/ is a folder"),
    ],
)
def test_bad_arguments(
    in_process: Run, tmp_path: Path, arguments: list[str], code: int, sentence: str
) -> None:
    save_file(random_tensors(small_shapes(1)), tmp_path / "in.safetensors")
    (tmp_path / "there.csv").write_text("old")
    (tmp_path / "link").symlink_to("target")
    file = [] if arguments[0].endswith("none.safetensors") else ["in.safetensors"]
    fails(in_process("probe", *file, *arguments), code, sentence)
    only(tmp_path, "in.safetensors", "link", "there.csv")
    assert (tmp_path / "there.csv").read_text() == "old"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_weights_are_named(
    in_process: Run, tmp_path: Path, dtype: torch.dtype, value: float
) -> None:
    tensors = random_tensors(small_shapes(1), dtype)
    tensors["layers.0.feed_forward.w2.weight"][33, 5] = value
    save_file(tensors, tmp_path / "in.safetensors")
    result = in_process("probe", "in.safetensors", "--csv", "a.csv", "--overwrite")
    fails(result, 1, '"layers.0.feed_forward.w2.weight" has NaN or Inf at row 33, column 5')
    only(tmp_path, "in.safetensors")


Change = Callable[[Tensors], object]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.clear() or t.update(a=torch.zeros(2)), "is not a Z-Image checkpoint"),
        (
            lambda t: t.update({"layers.0.attention.out.weight": torch.zeros(40, 40).double()}),
            '"layers.0.attention.out.weight" is F64; only BF16, F16 and F32',
        ),
        (
            lambda t: t.update({"layers.0.attention.out.weight": torch.zeros(0, 40)}),
            '"layers.0.attention.out.weight" is empty',
        ),
    ],
)
def test_checkpoints_that_cannot_be_probed(
    in_process: Run, tmp_path: Path, change: Change, sentence: str
) -> None:
    tensors = random_tensors(small_shapes(1))
    change(tensors)
    save_file(tensors, tmp_path / "in.safetensors")
    fails(in_process("probe", "in.safetensors"), 1, sentence)


@pytest.mark.parametrize(
    ("rules", "sentence"),
    [
        ({"outlier_sigma": "3"}, "outlier_sigma must be a number, not '3'"),
        ({"kurtosis_keep": None}, "kurtosis_keep must be a number, not None"),
        ({"extreme_pct": True}, "extreme_pct must be a number, not True"),
        ({"range_weight": torch.tensor(0.3)}, "range_weight must be a number, not tensor"),
        ({"spread_filter_exempt": "attention.qkv"}, "must be a list of layer types, not str"),
        ({"spread_filter_exempt": None}, "must be a list of layer types, not NoneType"),
    ],
)
def test_rules_of_other_types(rules: dict[str, object], sentence: str) -> None:
    with pytest.raises(zm.UsageError, match=re.escape(sentence)):
        zm.ProbeRules(**rules)  # type: ignore[arg-type]


def test_numbers_of_numpy_are_numbers(small_file: Path) -> None:
    report = zm.probe(small_file, rules=zm.ProbeRules(outlier_sigma=np.float32(2.5)))
    assert json.loads(json.dumps(report.to_dict()))["rules"]["outlier_sigma"] == 2.5
    with pytest.raises(zm.UsageError, match="rules must be ProbeRules, not dict"):
        zm.probe(small_file, rules={})  # type: ignore[arg-type]


def test_file_names_do_not_command_the_terminal(
    in_process: Run, small_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "a\x1b[31m\n.safetensors").symlink_to(small_file)
    result = in_process("probe", "a\x1b[31m\n.safetensors")
    assert result.stdout.startswith("a\\x1b[31m\\n.safetensors: 200 weights probed\n")


def test_quantised_checkpoints_are_refused(
    in_process: Run, small_file: Path, tmp_path: Path
) -> None:
    zm.convert(small_file, tmp_path / "q.safetensors")
    fails(in_process("probe", "q.safetensors"), 1, "q.safetensors is quantised already (MXFP8, see")


def test_a_full_disk_leaves_no_files(cli: Run, small_file: Path, tmp_path: Path) -> None:
    import resource

    def limit() -> None:  # as if the disk were full; the report has more
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    result = cli("probe", small_file, "--csv", "p.csv", preexec_fn=limit)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.startswith("zimage-mxfp8: error: p.csv could not be written")
    assert "200 weights probed" in result.stdout  # the work was not in vain
    only(tmp_path)


def test_progress_is_reported(small_file: Path, tmp_path: Path) -> None:
    tensors = random_tensors(small_shapes(1), torch.float32)
    save_file(tensors, tmp_path / "a.safetensors")
    for path, rounds in ((small_file, 1), (tmp_path / "a.safetensors", 2)):
        seen: list[zm.Progress] = []
        report = zm.probe(path, progress=seen.append)
        size = 2 * rounds
        nbytes = sum(math.prod(t.shape) * size * rounds for t in report.tensors)
        assert seen[-1].done == seen[-1].total == nbytes
        assert [p.done for p in seen] == sorted(p.done for p in seen)
    with pytest.raises(zm.UsageError, match="threads"):
        zm.probe(small_file, threads=-1)
