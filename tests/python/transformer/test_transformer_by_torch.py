"""The transformer without kernels: torch's operations, forced on the CPU, against the core's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import zimage_mxfp8 as zm
from helpers.checkpoints import change
from helpers.control_reference import (
    control_images,
    file_tensors,
    make_controlnet,
    write_controlnet,
)
from helpers.diffusers_reference import make_reference, random_inputs, relative_error
from helpers.live_bytes import LiveBytes
from zimage_mxfp8.analysis.sensitivity.rounding import round_to_mxfp8
from zimage_mxfp8.system import devices
from zimage_mxfp8.transformer import arithmetic, block, ops
from zimage_mxfp8.transformer.arithmetic import by_core, by_torch, scaled_mm, tiles
from zimage_mxfp8.transformer.compute import modes_of, unsupported
from zimage_mxfp8.transformer.linear import Linear
from zimage_mxfp8.transformer.sequence import layout_of

RAGGED = ([(16, 16), (4, 30), (2, 2)], [33, 1, 64])
COMPUTE = ["weight-only", "fp8", "mxfp8-emulated"]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hidden size is ragged (682), so that some layers have padding."""
    path = tmp_path_factory.mktemp("model")
    make_reference(dim=256).save_pretrained(path / "transformer")
    zm.convert(path / "transformer", path / "quantized.safetensors")
    return path / "quantized.safetensors"


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "has_kernels", lambda device: False)
    assert arithmetic.on(torch.device("cpu")) is by_torch


def run(path: Path, compute: str, dtype: torch.dtype, seed: int = 1) -> list[torch.Tensor]:
    model = zm.ZImageTransformer.from_checkpoint(path, "cpu", compute, dtype)
    sample: list[torch.Tensor] = model(*random_inputs(*RAGGED, seed)).sample
    return sample


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compute", COMPUTE)
def test_modes_agree_with_the_core(
    compute: str, dtype: torch.dtype, quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert arithmetic.on(torch.device("cpu")) is by_core
    want = run(quantized, compute, dtype)
    monkeypatch.setattr(devices, "has_kernels", lambda device: False)
    for name in ("TILE", "WEIGHT_TILE"):
        monkeypatch.setattr(tiles, name, 30_000)  # several in every operation
    found = run(quantized, compute, dtype)
    # Sums in another order; where that decides a rounding, a step of BF16 or of E4M3.
    bound = 0.06 if compute != "weight-only" else 1e-5 if dtype == torch.float32 else 0.02
    assert relative_error(found, want) < bound
    for seed in range(9):  # most images have no such tie, for float32's sums
        if compute == "weight-only" or dtype != torch.float32:
            break
        inputs = random_inputs([(4, 4)], [3], seed)
        model = zm.ZImageTransformer.from_checkpoint(quantized, "cpu", compute, dtype)
        monkeypatch.setattr(devices, "has_kernels", lambda device: True)
        core = model(*inputs).sample
        monkeypatch.setattr(devices, "has_kernels", lambda device: False)
        if relative_error(model(*inputs).sample, core) < 1e-5:
            break
    else:
        pytest.fail("no image is equal to float32's precision")


@pytest.mark.usefixtures("without_kernels")
def test_what_it_is_made_of(quantized: Path) -> None:
    model = zm.ZImageTransformer.from_checkpoint(quantized, "cpu", "fp8", torch.float32)
    assert 0 <= model.max_fold_error < 1e-6
    formats = {layer.weight_format for layer in model.modules() if isinstance(layer, Linear)}
    assert formats == {"fp8", "plain"}


@pytest.mark.usefixtures("without_kernels")
def test_nan_is_told_when_it_is_folded(quantized: Path, tmp_path: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        tensors["layers.1.attention.out.weight"].view(torch.uint8)[3, 5] = 255

    file = change(quantized, tmp_path / "damaged.safetensors", damage)
    with pytest.raises(
        zm.CheckpointError, match=r'"layers.1.attention.out" is damaged: .* row 3, columns 0 to 31'
    ):
        zm.ZImageTransformer.from_checkpoint(file, "cpu", "fp8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sensitivity_rounds_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(70, 50, generator=torch.manual_seed(0)).to(dtype)
    want = round_to_mxfp8(matrix)
    monkeypatch.setattr(devices, "has_kernels", lambda device: False)
    assert torch.equal(round_to_mxfp8(matrix), want)
    assert not torch.equal(want, matrix)


OPERATIONS = {
    "silu_multiply": lambda x, w, f, i, formats: ops.silu_multiply(x, x.flip(0), formats),
    "norm_modulate": lambda x, w, f, i, formats: ops.norm_modulate(x, w, f, i, formats),
    "add_norm_modulate": lambda x, w, f, i, formats: ops.add_norm_modulate(
        x.clone(), x.flip(0), w, f, w, f, i, formats
    ),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_tiles_change_nothing(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.manual_seed(0)
    x, w = torch.randn(90, 64, generator=generator).bfloat16(), torch.randn(64).bfloat16()
    factors, items = torch.randn(2, 64).bfloat16(), (torch.arange(90) // 50).int()
    results = []
    for tile in (1 << 20, 1000, 1):
        monkeypatch.setattr(tiles, "TILE", tile)
        result = OPERATIONS[operation](x, w, factors, items, {"bfloat16", "row-scaled"})
        results.append(result["bfloat16"])
    assert all(torch.equal(result, results[0]) for result in results)
    qkv, turns = torch.randn(90, 768, generator=generator).bfloat16(), torch.randn(90, 64, 2)
    rotated = []
    for tile in (1 << 20, 1000):
        monkeypatch.setattr(tiles, "TILE", tile)
        rotated.append(qkv.clone())
        ops.rotate_heads(rotated[-1], w.repeat(2), w.repeat(2), turns, 2, 2)
    assert torch.equal(*rotated) and not torch.equal(rotated[0], qkv)


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize("compute", COMPUTE)
def test_memory_of_a_forward(compute: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is told where memory runs out, against what is taken where it does not."""
    make_reference(dim=384).save_pretrained(tmp_path / "transformer")
    zm.convert(tmp_path / "transformer", tmp_path / "quantized.safetensors")
    model = zm.ZImageTransformer.from_checkpoint(tmp_path / "quantized.safetensors", "cpu", compute)
    # The CPU's attention takes memory that a CUDA device's does not.
    monkeypatch.setattr(block, "attend", lambda qkv, heads, lengths: qkv[:, : heads * 128] * 1)
    # The product of CUDA devices, which torch has on the CPU too.
    monkeypatch.setattr(by_torch, "multiply_row_scaled", lambda x, w, _: scaled_mm._multiply(x, w))
    for name in ("TILE", "WEIGHT_TILE"):
        monkeypatch.setattr(tiles, name, 1 << 18)
    layout_of.cache_clear()  # it holds tensors
    with LiveBytes() as live:
        model(*random_inputs([(128, 128)], [32]))
    told = model._working_nbytes([((1, 128, 128), 32)])
    workspaces = 64 << 20  # of cuBLAS
    assert told - workspaces == pytest.approx(live.peak, rel=0.25)
    write_controlnet(
        tmp_path / "net.safetensors",
        file_tensors("2.1", make_controlnet("2.1", (0, 1), dim=384, refiners=1)),
        torch.bfloat16,
    )
    zm.convert(tmp_path / "net.safetensors", tmp_path / "net-mxfp8.safetensors")
    net = zm.ZImageControlNet.from_checkpoint(tmp_path / "net-mxfp8.safetensors", "cpu", compute)
    images = [image.to(torch.bfloat16) for image in control_images([(128, 128)], 33)]
    layout_of.cache_clear()
    with LiveBytes() as controlled:
        inputs = random_inputs([(128, 128)], [32])
        model(*inputs, controlnet_block_samples=net.control(images))
    told_with_net = model._working_nbytes([((1, 128, 128), 32)], [net])
    assert told_with_net - workspaces == pytest.approx(controlled.peak, rel=0.25)
    assert told_with_net - told > (controlled.peak - live.peak) / 2


def test_modes_by_the_rule() -> None:
    """In the order in which "auto" takes them."""
    exact, in_fp8 = ["weight-only", "mxfp8-emulated"], ["fp8", "weight-only", "mxfp8-emulated"]
    assert modes_of((7, 0), kernels=False) == exact
    for capability in ((7, 5), (8, 0), (8, 6)):
        assert modes_of(capability, kernels=capability >= (8, 0)) == ["int8", *exact]
    for kernels in (False, True):
        assert modes_of((8, 9), kernels=kernels) == ["int8", *in_fp8]
    assert modes_of((9, 0), kernels=True) == ["int8", *in_fp8]
    by_torch = ["fp8", "int8", "weight-only", "mxfp8-emulated"]
    for capability in ((9, 0), (10, 0), (12, 0)):
        assert modes_of(capability, kernels=False) == by_torch
    assert modes_of((12, 0), kernels=True) == ["mxfp8", *by_torch]


@pytest.mark.usefixtures("without_kernels")
def test_native_mxfp8_says_that_it_needs_kernels() -> None:
    assert unsupported("mxfp8", 0).startswith("it needs CUDA kernels, and ")
