"""Validation: every way in which a file can be wrong is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import zimage_mxfp8 as zm
from helpers.checkpoints import PREFIX, Tensors, random_tensors, small_shapes, to_diffusers
from helpers.commands import Run
from helpers.convert_to_quant import card_command
from zimage_mxfp8.conversion.validation.report import ValidationReport
from zimage_mxfp8.conversion.validation.run import validate
from zimage_mxfp8.zimage.layers import zimage_shapes

LAYER = "layers.1.feed_forward.w2"
HEADER = "_quantization_metadata"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sizes for which the blocked scales and the logical scales have the same shape, and others."""
    path = tmp_path_factory.mktemp("validate") / "original.safetensors"
    shapes = zimage_shapes(dim=128, layers=3, caption_dim=48, hidden=341)
    save_file(random_tensors(shapes), path, {"origin": "here"})
    return path


@pytest.fixture(scope="module")
def converted(original: Path) -> Path:
    path = original.with_name("converted.safetensors")
    zm.convert(original, path)
    return path


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as opened:
        return dict(opened.metadata())


def damage(
    converted: Path, tmp_path: Path, change: Callable[[Tensors, dict[str, str]], object]
) -> Path:
    tensors, metadata = load_file(converted), metadata_of(converted)
    change(tensors, metadata)
    path = tmp_path / "damaged.safetensors"
    save_file(tensors, path, metadata)
    return path


def sentences(report: ValidationReport) -> list[str]:
    return [str(breach) for breach in report.breaches]


def json_tensor(document: object) -> torch.Tensor:
    return torch.tensor(list(json.dumps(document).encode()), dtype=torch.uint8)


@pytest.mark.parametrize("recipe", ["uniform", "zimage"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_own_output_is_sound(tmp_path: Path, recipe: str, dtype: torch.dtype, prefix: str) -> None:
    source, output = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    tensors = random_tensors(small_shapes(2), dtype)
    tensors["layers.0.feed_forward.w1.weight"][3:9] = 0  # blocks of zeros
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, source)
    zm.convert(source, output, recipe=recipe)
    report = validate(output, source)
    assert report.ok, sentences(report)
    assert len(report.errors) == report.layers > 15
    assert all(0 < s.relative_squared_error < 2e-3 for s in report.errors.values())
    assert validate(output).ok


@pytest.mark.peer
def test_the_peers_output_is_sound(original: Path, tmp_path: Path) -> None:
    from helpers.convert_to_quant import run_convert_to_quant

    output = tmp_path / "out.safetensors"
    run_convert_to_quant(card_command(original, output))
    assert validate(output, original).ok


def test_diffusers_original(original: Path, converted: Path, tmp_path: Path) -> None:
    tensors = to_diffusers(load_file(original))
    save_file(tensors, tmp_path / "diffusers.safetensors", {"origin": "here"})
    assert validate(converted, tmp_path / "diffusers.safetensors").ok


def test_kept_nonfinite_layer(original: Path, tmp_path: Path) -> None:
    tensors = load_file(original)
    tensors[f"{LAYER}.weight"][0, 0] = float("nan")
    source, output = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, source)
    zm.convert(source, output, nonfinite="keep")
    report = validate(output, source)
    assert [b.tensor for b in report.breaches] == [f"{LAYER}.weight"]
    assert "has NaN or Inf" in report.breaches[0].problem


def swizzle_twice(tensors: Tensors, _: object) -> None:
    tensors[f"{LAYER}.weight_scale"] = zm.to_blocked(tensors[f"{LAYER}.weight_scale"])


def unswizzle(tensors: Tensors, _: object) -> None:
    scale = tensors[f"{LAYER}.weight_scale"]
    tensors[f"{LAYER}.weight_scale"] = zm.from_blocked(scale, *scale.shape)


def shuffle(tensors: Tensors, _: object) -> None:
    scale = tensors[f"{LAYER}.weight_scale"]
    tensors[f"{LAYER}.weight_scale"] = scale.flip(0).contiguous()


def bump_scale(tensors: Tensors, _: object) -> None:
    tensors[f"{LAYER}.weight_scale"][0, 0] += 1


def change_code(tensors: Tensors, _: object) -> None:
    tensors[f"{LAYER}.weight"].view(torch.uint8)[5, 5] ^= 1


@pytest.mark.parametrize(
    ("change", "tensor", "problem"),
    [
        (swizzle_twice, f"{LAYER}.weight_scale", "has its scales swizzled twice"),
        (unswizzle, f"{LAYER}.weight_scale", "row-major order, not in the 128x4"),
        (shuffle, f"{LAYER}.weight_scale", "the right scales in a wrong order"),
        (bump_scale, f"{LAYER}.weight_scale", "has scales that differ from the original's (1)"),
        (
            change_code,
            f"{LAYER}.weight",
            "has codes that are not the original's rounded to nearest (1)",
        ),
        (
            lambda t, _: t.__setitem__("x_embedder.bias", t["x_embedder.bias"] + 1),
            "x_embedder.bias",
            "differs from the original, though it is not quantised",
        ),
        (lambda t, _: t.pop("x_pad_token"), "x_pad_token", "is missing"),
        (lambda _, m: m.pop("origin"), "origin", "is metadata of the original that is lost"),
        (
            lambda t, _: t["layers.0.adaLN_modulation.0.bias"].__setitem__(3, float("nan")),
            "layers.0.adaLN_modulation.0.bias",
            "has NaN or Inf",
        ),
        (
            lambda t, _: t.update({"more": torch.zeros(3)}),
            "more",
            "is not in the original",
        ),
    ],
)
def test_what_the_original_shows(
    original: Path, converted: Path, tmp_path: Path, change: object, tensor: str, problem: str
) -> None:
    path = damage(converted, tmp_path, change)  # type: ignore[arg-type]
    (breach,) = validate(path, original).breaches  # one cause, one sentence
    assert breach.tensor == tensor and problem in breach.problem
    assert breach.remedy == "convert the original again"


@pytest.mark.parametrize("layer", ["layers.0.attention.qkv", "layers.0.feed_forward.w1"])
def test_swizzled_twice_is_caught_in_every_shape(
    original: Path, converted: Path, tmp_path: Path, layer: str
) -> None:
    def change(tensors: Tensors, _: object) -> None:
        name = f"{layer}.weight_scale"
        tensors[name] = zm.to_blocked(tensors[name])

    assert f'"{layer}.weight_scale" has its scales swizzled twice' in "\n".join(
        sentences(validate(damage(converted, tmp_path, change), original))
    )


def marker_without(key: str) -> Callable[[Tensors, dict[str, str]], None]:
    def change(tensors: Tensors, _: object) -> None:
        marker = json.loads(bytes(tensors[f"{LAYER}.comfy_quant"].tolist()))
        del marker[key]
        tensors[f"{LAYER}.comfy_quant"] = json_tensor(marker)

    return change


def header_says(change: Callable[[dict[str, object]], object]) -> object:
    def apply(_: object, metadata: dict[str, str]) -> None:
        document = json.loads(metadata[HEADER])
        change(document)
        metadata[HEADER] = json.dumps(document)

    return apply


WEIGHT, SCALE, MARKER = (f"{LAYER}.{part}" for part in ("weight", "weight_scale", "comfy_quant"))


@pytest.mark.parametrize(
    ("change", "tensor", "problem"),
    [
        (
            lambda t, m: (t.pop(MARKER), header_says(lambda d: d["layers"].pop(LAYER))(t, m)),
            MARKER,
            "without scales and draw noise",
        ),
        (lambda t, _: t.pop(SCALE), SCALE, "is missing"),
        (lambda t, _: t.pop(WEIGHT), WEIGHT, "is missing, though"),
        (lambda _, m: m.update({HEADER: "[]"}), HEADER, "in JSON"),
        (lambda _, m: m.update({HEADER: "{"}), HEADER, "in JSON"),
        (header_says(lambda d: d["layers"][LAYER].update(format="nvfp4")), HEADER, '"nvfp4"'),
        (
            header_says(lambda d: d["layers"][LAYER].update(full_precision_matrix_mult=True)),
            HEADER,
            "disagrees about layer",
        ),
        (header_says(lambda d: d["layers"].update({LAYER: 3})), HEADER, "not a JSON object"),
        (
            header_says(lambda d: d["layers"].update({"layers.0.ghost": {"format": "mxfp8"}})),
            "layers.0.ghost.weight",
            "is missing",
        ),
        (
            lambda t, _: t.update({MARKER: json_tensor({"format": "nvfp4"})}),
            HEADER,
            "disagrees about layer",
        ),
        (lambda t, _: t.update({MARKER: json_tensor([])}), MARKER, "is not a JSON object"),
        (lambda t, _: t.update({MARKER: torch.zeros(9, dtype=torch.uint8)}), MARKER, "is not JSON"),
        (lambda t, _: t.update({MARKER: torch.zeros(9)}), MARKER, "not a short list of U8"),
        (lambda t, _: t.update({WEIGHT: t[WEIGHT].to(torch.float8_e5m2)}), WEIGHT, "is F8_E5M2"),
        (lambda t, _: t.update({WEIGHT: t[WEIGHT][:96].clone()}), WEIGHT, "padded to 32"),
        (lambda t, _: t.update({SCALE: t[SCALE].view(torch.int8)}), SCALE, "is I8, not U8"),
        (lambda t, _: t.update({SCALE: t[SCALE].reshape(-1)}), SCALE, "but the blocked scales are"),
        (
            lambda t, _: t[WEIGHT].view(torch.uint8)[3].__setitem__(3, 0x7F),
            WEIGHT,
            "has NaN codes (1)",
        ),
        (
            lambda t, _: t[WEIGHT].view(torch.uint8)[:, 341:].fill_(1),
            WEIGHT,
            "has codes other than 0 in its padding (1,408)",
        ),
        (lambda t, _: t[SCALE][0].__setitem__(0, 255), SCALE, "has NaN scales (1)"),
        (lambda t, _: t[SCALE].view(-1).__setitem__(-1, 9), SCALE, "other than 0 in its padding"),
        (lambda t, _: t[WEIGHT].view(torch.uint8)[0].fill_(0), SCALE, "for blocks of zeros"),
        (lambda t, _: t.pop("layers.0.attention_norm1.weight"), None, "is missing"),
        (lambda t, _: t.pop("cap_pad_token"), "cap_pad_token", "does not recognise Z-Image"),
        (
            lambda t, _: t.update({"layers.0.ffn_norm1.weight": torch.zeros(7).bfloat16()}),
            "layers.0.ffn_norm1.weight",
            "is [7], not [128]",
        ),
        (
            lambda t, _: t["x_embedder.bias"].__setitem__(1, float("inf")),
            "x_embedder.bias",
            "has NaN or Inf",
        ),
    ],
)
def test_what_the_file_itself_shows(
    original: Path,
    converted: Path,
    tmp_path: Path,
    change: object,
    tensor: str | None,
    problem: str,
) -> None:
    path = damage(converted, tmp_path, change)  # type: ignore[arg-type]
    (breach,) = validate(path).breaches
    assert tensor in (None, breach.tensor) and problem in breach.problem
    assert len(validate(path, original).breaches) == 1


@pytest.mark.parametrize(
    ("change", "tensor", "problem"),
    [
        (lambda t, _: t[WEIGHT].view(torch.uint8)[0].fill_(0), WEIGHT, "rounded to nearest (341)"),
        (
            lambda t, _: t["x_embedder.bias"].__setitem__(1, float("inf")),
            "x_embedder.bias",
            "NaN or Inf",
        ),
    ],
)
def test_the_original_shows_what_is_wrong(
    original: Path, converted: Path, tmp_path: Path, change: object, tensor: str, problem: str
) -> None:
    path = damage(converted, tmp_path, change)  # type: ignore[arg-type]
    (alone,) = validate(path).breaches
    (compared,) = validate(path, original).breaches
    assert compared.tensor == tensor and problem in compared.problem
    assert compared.remedy == "convert the original again" and alone != compared


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        (lambda t, _: t.pop("x_pad_token"), "complete the original and convert it again"),
        (
            lambda t, _: t.update({"layers.0.extra.weight": torch.zeros(3, 3)}),
            "take it out of the original and convert it again",
        ),
    ],
)
def test_a_sound_original_need_not_be_repaired(
    original: Path, converted: Path, tmp_path: Path, change: object, remedy: str
) -> None:
    path = damage(converted, tmp_path, change)  # type: ignore[arg-type]
    assert [b.remedy for b in validate(path).breaches] == [remedy]
    assert [b.remedy for b in validate(path, original).breaches] == ["convert the original again"]


def test_two_causes_in_one_tensor_are_two_breaches(
    original: Path, converted: Path, tmp_path: Path
) -> None:
    def change(tensors: Tensors, _: object) -> None:
        tensors[WEIGHT].view(torch.uint8)[3, :2] = 0x7F
        tensors[WEIGHT].view(torch.uint8)[4, :5] ^= 1

    assert [
        b.problem for b in validate(damage(converted, tmp_path, change), original).breaches
    ] == [
        "has more codes that are not the original's rounded to nearest (5)",
        "has NaN codes (2)",
    ]


def test_diffusers_names_with_quantised_layers(converted: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors, _: object) -> None:
        tensors["all_x_embedder.2-1.weight"] = tensors.pop("x_embedder.weight")

    with pytest.raises(zm.CheckpointError, match="diffusers names and quantised layers"):
        validate(damage(converted, tmp_path, change))


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda t, _: t.pop(MARKER), "1 layer described in the header only"),
        (lambda _, m: m.pop(HEADER), "layers described by comfy_quant tensors only"),
        (header_says(lambda d: d["layers"].pop(LAYER)), "1 layer described by comfy_quant tensors"),
        (header_says(lambda d: d.update(format_version="2")), None),
        (header_says(lambda d: d["layers"][LAYER].update(group_size=16)), "described differently"),
        (header_says(lambda d: d["layers"].update(ghost={"format": "mxfp8"})), None),
        (marker_without("orig_shape"), "1 layer described differently"),
        (marker_without("group_size"), "1 layer described differently"),
        (
            lambda t, _: t.update({MARKER: torch.cat([t[MARKER], t[MARKER][-1:] * 0 + 32])}),
            None,  # JSON with a space at its end
        ),
        (
            lambda t, _: t.update({SCALE: t[SCALE].view(torch.float8_e8m0fnu)}),
            "1 scale tensor stored as F8_E8M0",
        ),
    ],
)
def test_what_comfyui_reads_is_a_note(
    original: Path, converted: Path, tmp_path: Path, change: object, note: str | None
) -> None:
    report = validate(damage(converted, tmp_path, change), original)  # type: ignore[arg-type]
    assert report.ok, sentences(report)
    about_layers = [n for n in report.notes if "layer" in n or "scale tensor" in n]
    assert len(about_layers) == (note is not None)
    assert note is None or note in about_layers[0]


@pytest.mark.parametrize("recipe", ["uniform", "zimage"])
def test_wrong_order_is_named_for_wide_sources_too(tmp_path: Path, recipe: str) -> None:
    source, output = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(random_tensors(small_shapes(2), torch.float32), source)
    zm.convert(source, output, recipe=recipe)
    report = validate(damage(output, tmp_path, swizzle_twice), source)
    assert [b.problem for b in report.breaches if "swizzled twice" in b.problem]


def test_scale_0_over_numbers_is_a_note(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for a tensor, in however many pieces it is read."""
    scale = "layers.1.feed_forward.w1.weight_scale"

    def change(tensors: Tensors, _: object) -> None:
        tensors[scale].view(-1)[[0, 512]] = 0  # of rows 0 and 128

    monkeypatch.setattr("zimage_mxfp8.streaming.jobs.CHUNK_BYTES", 1 << 14)
    report = validate(damage(converted, tmp_path, change))
    assert [note for note in report.notes if "comfy-kitchen" in note] == [
        f'"{scale}" has blocks of numbers with scale 0, which comfy-kitchen reads as 0 and the '
        "hardware as 2^-127 (2)"
    ]


def test_stray_block_numbers_cost_nothing(converted: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors, _: object) -> None:
        tensors["layers.99999999.x"] = torch.zeros(0)
        tensors[f"layers.{'9' * 5000}.x"] = torch.zeros(0)

    report = validate(damage(converted, tmp_path, change))
    assert any(b.tensor.startswith("layers.3.") for b in report.breaches)
    assert len(report.breaches) < 50


def test_original_with_nan(original: Path, converted: Path, tmp_path: Path) -> None:
    tensors = load_file(original)
    tensors[WEIGHT][5, 6] = float("nan")
    save_file(tensors, tmp_path / "nan.safetensors", {"origin": "here"})
    report = validate(converted, tmp_path / "nan.safetensors")
    assert [b.tensor for b in report.breaches] == [WEIGHT]
    assert "NaN or Inf (row 5, column 6)" in report.breaches[0].problem


def test_quantised_original(converted: Path) -> None:
    with pytest.raises(zm.CheckpointError, match=r"is quantised already \(MXFP8"):
        validate(converted, converted)


def test_unquantised_file(original: Path) -> None:
    with pytest.raises(zm.CheckpointError, match="has no MXFP8 layers"):
        validate(original)


def test_files_that_are_swapped(in_process: Run, original: Path, converted: Path) -> None:
    result = in_process("validate", original, "--against", converted)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        f"zimage-mxfp8: error: {original} is an original and {converted} is quantised, so they are "
        "swapped; name the quantised file first, and the original with --against\n"
    )


def test_other_original(converted: Path, tmp_path: Path) -> None:
    shapes = zimage_shapes(dim=128, layers=3, caption_dim=48, hidden=400)
    save_file(random_tensors(shapes), tmp_path / "other.safetensors")
    report = validate(converted, tmp_path / "other.safetensors")
    assert any(
        "encodes [128, 341], but the original is BF16 [128, 400]" in s for s in sentences(report)
    )
    printed = str(report).splitlines()
    assert sum(line.startswith("breach: ") for line in printed) == 5
    assert f"... and {len(report.breaches) - 5} more breaches (to_dict() has all)" in printed


def test_inspect_names_some_breaches_and_counts_the_rest(
    converted: Path, tmp_path: Path, in_process: Run
) -> None:
    def change(tensors: Tensors, _: object) -> None:
        for name in [name for name in tensors if name.endswith(".weight_scale")]:
            del tensors[name]

    path = damage(converted, tmp_path, change)
    lines = in_process("inspect", path).stderr.splitlines()
    assert len(lines) == 6 and all('.weight_scale" is missing' in line for line in lines[:5])
    count = len(zm.inspect(path).breaches)
    assert lines[5] == f"zimage-mxfp8: warning: ... and {count - 5} more breaches (--json has all)"


def test_command(in_process: Run, original: Path, converted: Path, tmp_path: Path) -> None:
    good = in_process("validate", converted, "--against", original)
    assert good.returncode == 0, good.stdout + good.stderr
    assert "sound, " in good.stdout and "SNR" in good.stdout
    bad = in_process("validate", damage(converted, tmp_path, swizzle_twice), "--against", original)
    assert bad.returncode == 1
    assert f'breach: "{SCALE}" has its scales swizzled twice; convert the original' in bad.stdout
    document = json.loads(in_process("validate", converted, "--against", original, "--json").stdout)
    assert document["ok"] and len(document["tensors"]) == document["layers"]
    missing = in_process("validate", "none.safetensors")
    assert missing.returncode == 1 and "does not exist" in missing.stderr
