"""The comparison of two transformers' weights, against matrices that are decoded as a whole."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import zimage_mxfp8 as zm
from helpers.checkpoints import change, random_tensors
from zimage_mxfp8.analysis.evaluate import weights as module
from zimage_mxfp8.analysis.evaluate.thresholds import DEFAULT_MAX_WEIGHT_ERROR
from zimage_mxfp8.analysis.evaluate.weights import WeightComparison, compare_weights
from zimage_mxfp8.analysis.evaluate.wording import weight_failures
from zimage_mxfp8.streaming.jobs import Progress
from zimage_mxfp8.transformer.model_file import open_model
from zimage_mxfp8.zimage.layers import zimage_shapes

RAGGED = {"dim": 128, "refiner_layers": 1, "caption_dim": 50, "hidden": 75}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in BF16, in MXFP8, and decoded from that."""
    path = tmp_path_factory.mktemp("weights")
    save_file(random_tensors(zimage_shapes(layers=2, **RAGGED)), path / "bf16.safetensors")
    zm.convert(path / "bf16.safetensors", path / "mxfp8.safetensors")
    zm.dequantize_checkpoint(path / "mxfp8.safetensors", path / "decoded.safetensors")
    return path


def compared(folder: Path, a: str, b: str) -> WeightComparison:
    return compare_weights(*(open_model(folder / f"{name}.safetensors") for name in (a, b)))


@pytest.mark.parametrize(
    ("a", "b"), [("mxfp8", "bf16"), ("bf16", "mxfp8"), ("bf16", "decoded"), ("mxfp8", "mxfp8")]
)
@pytest.mark.parametrize("chunk", [1, 1 << 21])
def test_differences_are_those_of_whole_decoded_matrices(
    folder: Path, a: str, b: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK", chunk)
    found = compared(folder, a, b)
    plain = {"mxfp8": "decoded"}
    of_a, of_b = (load_file(folder / f"{plain.get(name, name)}.safetensors") for name in (a, b))
    stored = {name: load_file(folder / f"{name}.safetensors") for name in {a, b}}
    matrices = {name for name in of_b if name.endswith(".weight") and of_b[name].dim() == 2}
    assert {layer.name for layer in found.layers} == matrices
    error = signal = 0.0
    for layer in found.layers:
        x, y = of_a[layer.name].double(), of_b[layer.name].double()
        assert layer.shape == tuple(y.shape)
        assert layer.squared_error == pytest.approx(float(((x - y) ** 2).sum()), rel=1e-6)
        assert layer.squared_signal == pytest.approx(float((y**2).sum()), rel=1e-6)
        error, signal = error + layer.squared_error, signal + layer.squared_signal
        words = {torch.float8_e4m3fn: "MXFP8", torch.bfloat16: "BF16"}
        assert layer.a_format == words[stored[a][layer.name].dtype]
        assert layer.b_format == words[stored[b][layer.name].dtype]
        tensors = [
            stored[a].get(layer.name.replace(".weight", x)) for x in (".weight", ".weight_scale")
        ]
        assert layer.a_nbytes == sum(t.numel() * t.itemsize for t in tensors if t is not None)
    assert found.relative_squared_error == pytest.approx(error / signal, rel=1e-12)
    assert found.are_equal == (a == b)
    assert found.a_bytes == (folder / f"{a}.safetensors").stat().st_size
    if {a, b} == {"mxfp8", "bf16"}:
        assert 1e-4 < found.relative_squared_error < 1e-3, "as MXFP8 has"


def test_equal_values_are_equal_in_any_format(folder: Path) -> None:
    found = compared(folder, "mxfp8", "decoded")
    assert found.are_equal and found.relative_squared_error == 0
    assert found.formats[0]["MXFP8"] > 0 == found.formats[1]["MXFP8"]
    assert found.formats[0].total() == found.formats[1].total() == len(found.layers)


def test_damage_is_in_its_layers(folder: Path, tmp_path: Path) -> None:
    names = ("layers.0.attention.qkv", "layers.1.attention.qkv")

    def swap(tensors: dict[str, torch.Tensor], _: object) -> None:
        a, b = (f"{name}.weight_scale" for name in names)
        tensors[a], tensors[b] = tensors[b], tensors[a]
        tensors[a][0, 0] += 3

    change(folder / "mxfp8.safetensors", tmp_path / "swapped.safetensors", swap)
    found = compare_weights(
        open_model(tmp_path / "swapped.safetensors"), open_model(folder / "mxfp8.safetensors")
    )
    wrong = {layer.name.removesuffix(".weight") for layer in found.layers if layer.squared_error}
    assert wrong == set(names)


def test_layers_without_a_counterpart(folder: Path, tmp_path: Path) -> None:
    """A model with fewer blocks and a wider feed-forward."""
    shapes = zimage_shapes(layers=1, **{**RAGGED, "hidden": 80})
    save_file(random_tensors(shapes), tmp_path / "other.safetensors")
    a, b = open_model(folder / "mxfp8.safetensors"), open_model(tmp_path / "other.safetensors")
    found = {layer.name: layer for layer in compare_weights(a, b).layers}
    missing = found["layers.1.attention.qkv.weight"]
    assert (missing.a_format, missing.b_format, missing.squared_error) == ("MXFP8", None, None)
    wider = found["layers.0.feed_forward.w2.weight"]
    assert (wider.b_format, wider.relative_squared_error) == ("BF16", None)
    other = found["layers.0.attention.qkv.weight"].relative_squared_error
    assert other is not None and 0.5 < other < 5
    turned = {layer.name: layer for layer in compare_weights(b, a).layers}
    assert turned["layers.1.attention.qkv.weight"].a_format is None
    assert turned["layers.1.attention.qkv.weight"].shape == (384, 128)
    assert not compare_weights(a, b).are_equal
    shape = {name: layer.shape for name, layer in found.items()}
    other_shape = {name: layer.shape for name, layer in turned.items()}
    different = {name for name in shape if shape[name] != other_shape[name]}
    alone = {name for name, layer in found.items() if None in (layer.a_format, layer.b_format)}
    assert len(different) == 9 and len(alone) > 4  # w1, w2 and w3 of three blocks
    assert {layer.name for layer in compare_weights(a, b).not_comparable} == different | alone


def test_the_default_threshold_is_above_the_largest_error_of_e4m3(
    folder: Path, tmp_path: Path
) -> None:
    """17/16 lies between two codes of every block that has no other value: 1/17 is lost."""

    def fill(tensors: dict[str, torch.Tensor], _: object) -> None:
        for tensor in tensors.values():
            if tensor.dim() == 2:
                tensor.fill_(17 / 16)

    change(folder / "bf16.safetensors", tmp_path / "bf16.safetensors", fill)
    zm.convert(tmp_path / "bf16.safetensors", tmp_path / "mxfp8.safetensors")
    worst = compared(tmp_path, "mxfp8", "bf16").worst
    assert worst is not None and worst.a_format == "MXFP8"
    assert worst.relative_squared_error == pytest.approx(1 / 17**2)
    assert DEFAULT_MAX_WEIGHT_ERROR > 1 / 17**2


def test_nan_is_the_worst_error(folder: Path, tmp_path: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor], _: object) -> None:
        tensors["layers.0.attention.out.weight"][3, 4] = math.nan
        tensors["layers.1.attention.out.weight"].zero_()  # a relative error of 1

    change(folder / "bf16.safetensors", tmp_path / "damaged.safetensors", damage)
    (tmp_path / "bf16.safetensors").symlink_to(folder / "bf16.safetensors")
    found = compared(tmp_path, "damaged", "bf16")
    (failure,) = weight_failures(found, 100.0)
    assert "layers.0.attention.out.weight is nan, above 100" in failure


def test_numbers_whose_squares_float32_does_not_hold(folder: Path, tmp_path: Path) -> None:
    def enlarge(tensors: dict[str, torch.Tensor], _: object) -> None:
        tensors["layers.0.attention.out.weight"][3, 4] = 2.0**127

    change(folder / "bf16.safetensors", tmp_path / "large.safetensors", enlarge)
    (tmp_path / "bf16.safetensors").symlink_to(folder / "bf16.safetensors")
    layers = {x.name: x for x in compared(tmp_path, "large", "bf16").layers}
    changed = layers["layers.0.attention.out.weight"]
    assert changed.squared_error == pytest.approx(2.0**254)
    layers = {x.name: x for x in compared(tmp_path, "bf16", "large").layers}
    assert layers[changed.name].relative_squared_error == pytest.approx(1)


def test_a_matrix_of_zeros_in_b(folder: Path, tmp_path: Path) -> None:
    def clear(tensors: dict[str, torch.Tensor], _: object) -> None:
        tensors["layers.0.attention.out.weight"].zero_()

    change(folder / "bf16.safetensors", tmp_path / "zeros.safetensors", clear)
    a, b = open_model(folder / "bf16.safetensors"), open_model(tmp_path / "zeros.safetensors")
    for one, two, error in ((a, b, 1.0), (b, b, 0.0)):
        found = {layer.name: layer for layer in compare_weights(one, two).layers}
        assert found["layers.0.attention.out.weight"].relative_squared_error == error


def test_progress_is_that_of_both_files(folder: Path) -> None:
    seen: list[Progress] = []
    a, b = (open_model(folder / f"{name}.safetensors") for name in ("mxfp8", "bf16"))
    compare_weights(a, b, seen.append)
    assert seen[-1].done == seen[-1].total
    smaller = math.prod((384, 128)) * 2  # of one layer in B
    assert (
        smaller
        < seen[-1].total
        <= sum((folder / f"{name}.safetensors").stat().st_size for name in ("mxfp8", "bf16"))
    )
