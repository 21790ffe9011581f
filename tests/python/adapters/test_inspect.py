"""`inspect` of adapters: what they are, what they change, and what fits Z-Image."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import zimage_mxfp8 as zm
from helpers import adapter_files as af
from helpers.diffusers_reference import make_reference
from zimage_mxfp8.adapters.files import open_adapter
from zimage_mxfp8.cli.main import main
from zimage_mxfp8.zimage.layers import zimage_shapes

STEM = "transformer.layers.0.attention.to_q"


def pair(stem: str, rows: int, columns: int, rank: int = 2, ends=("lora_A", "lora_B")):
    down, up = torch.zeros(rank, columns), torch.zeros(rows, rank)
    return {f"{stem}.{ends[0]}.weight": down, f"{stem}.{ends[1]}.weight": up}


def mixed() -> dict[str, torch.Tensor]:
    """A file of many dialects, for the real widths."""
    kohya = "lora_unet_layers_1_attention_qkv"
    tensors = pair("transformer.layers.0.attention.to_q", 3840, 3840)
    tensors |= pair("transformer.layers.29.attention.to_q", 3840, 3840, 4)
    tensors |= pair(kohya, 11520, 3840, 6, ("lora_down", "lora_up"))
    tensors[f"{kohya}.alpha"] = torch.tensor(3.0, dtype=torch.float16)
    tensors |= pair("transformer.noise_refiner.1.feed_forward.w2", 3840, 10240)
    tensors["transformer.noise_refiner.1.feed_forward.w2.dora_scale"] = torch.ones(3840, 1)
    tensors["lycoris_layers_2_feed_forward_w1.lokr_w1"] = torch.zeros(16, 16)
    tensors["lycoris_layers_2_feed_forward_w1.lokr_w2"] = torch.zeros(640, 240)
    tensors["lycoris_layers_2_feed_forward_w1.alpha"] = torch.tensor(float("inf"))
    tensors["diffusion_model.layers.0.attention.norm_q.diff"] = torch.zeros(128)
    tensors["diffusion_model.x_embedder.diff_b"] = torch.zeros(3840)
    return tensors


def others() -> dict[str, torch.Tensor]:
    """What does not fit: too wide, too many blocks, OFT, the text encoder, no adapter's name."""
    tensors = pair("transformer.layers.3.attention.to_q", 3072, 3072)
    tensors |= pair("transformer.layers.30.attention.to_q", 3840, 3840)
    tensors["layers.5.attention.out.lora_A.weight"] = torch.zeros(2, 3840)
    tensors["layers.4.attention.out.oft_blocks"] = torch.zeros(4, 4, 4)
    tensors |= pair("lora_te_layers_0_self_attn_q_proj", 96, 96, 2, ("lora_down", "lora_up"))
    return tensors | {"something.else": torch.zeros(1)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    metadata = {
        "ss_base_model_version": "z_image",
        "modelspec.architecture": "Z-Image/lora",
        "ss_network_module": "networks.lora_zimage",
        "ss_network_dim": "77",
        "ss_network_alpha": "55",
        "lora_adapter_metadata": json.dumps({"transformer.base_model_name_or_path": "a/b"}),
    }
    save_file(mixed() | others(), tmp_path / "a.safetensors", metadata)
    return tmp_path / "a.safetensors"


def test_report(file: Path) -> None:
    found = zm.inspect(file)
    adapter = found.adapter
    assert adapter is not None
    assert adapter.model == "Z-Image" and adapter.base_model == "Z-Image/lora, z_image, a/b"
    assert adapter.kinds == {"DoRA": 1, "LoKr": 1, "LoRA": 6, "OFT": 1, "difference": 2}
    assert adapter.spellings == {
        "": 2,
        "diffusion_model.": 2,
        "lora_unet_": 1,
        "lycoris_": 1,
        "transformer.": 5,
    }
    assert adapter.dtypes["F16"] == 1
    assert adapter.ranks == {2: 5, 4: 1, 6: 1}
    assert adapter.alphas == {3.0: 1, float("inf"): 1}
    assert adapter.targets == {
        "layers attention.q_norm": 1,
        "layers attention.qkv": 1,
        "layers attention.qkv (to_q)": 2,
        "layers feed_forward.w1": 1,
        "noise_refiner feed_forward.w2": 1,
        "x_embedder": 1,
    }
    assert adapter.fitting == 7
    assert adapter.misfits == {
        "transformer.layers.3.attention.to_q": "is for a layer of 3072 x 3072, not 3840 x 3840",
        "layers.4.attention.out": "is OFT, which is not supported",
        "layers.5.attention.out": "lacks a matrix, or has one of another number of axes",
    }
    assert len(adapter.unmatched) == 3 and "something.else" in adapter.unmatched
    assert len(adapter.text_encoder) == 2
    assert found.accepted_by == []
    assert found.refusal == (
        'it is OFT (tensor "layers.4.attention.out.oft_blocks"), which is not supported; merge it '
        "into the original weights with the program that trained it"
    )


def test_printed(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(file)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for part in (
        "kinds: DoRA (1), LoKr (1), LoRA (6), OFT (1), difference (2)",
        'names begin with: "" (2), "diffusion_model." (2)',
        "ranks: 2 (5), 4 (1), 6 (1)",
        "alphas: 3 (1), inf (1)",
        "trained on: Z-Image/lora, z_image, a/b",
        "metadata ss_network_module: networks.lora_zimage",
        "metadata ss_network_dim: 77",
        "metadata ss_network_alpha: 55",
        "noise_refiner feed_forward.w2",
        'does not fit: "layers.4.attention.out" is OFT, which is not supported',
        "3 tensors belong to nothing in Z-Image",
        "2 tensors are for the text encoder, and not applied",
        "no command takes it",
    ):
        assert part in shown, (part, shown)
    assert main(["inspect", str(file), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["adapter"]["fitting"] == 7 and document["adapter"]["alphas"]["inf"] == 1


@pytest.mark.parametrize("rank_scaled", [True, False])
def test_alphas_of_the_header(rank_scaled: bool, tmp_path: Path, capsys) -> None:
    written = af.write_peft(make_reference(dim=256, layers=3), 6.0, rank_scaled)
    written.tensors["transformer.layers.1.attention.to_q.alpha"] = torch.tensor(5.0)
    written.tensors["transformer.layers.0.attention.norm_q.diff"] = torch.zeros(128)
    save_file(written.tensors, tmp_path / "a.safetensors", written.metadata)
    adapter = zm.inspect(tmp_path / "a.safetensors").adapter
    assert adapter is not None
    assert adapter.alphas == {5.0: 1, 6.0: 8, 12.0: 1}
    assert adapter.rank_scaled is rank_scaled
    assert main(["inspect", str(tmp_path / "a.safetensors")]) == 0
    shown = capsys.readouterr().out
    assert "alphas: 5 (1), 6 (8), 12 (1)" in shown
    assert ("rsLoRA: alpha is divided by the root of the rank" in shown) is rank_scaled


@pytest.mark.parametrize("rank_scaled", [True, False])
def test_flags_of_the_whole_file(rank_scaled: bool, tmp_path: Path) -> None:
    flags = {"use_dora_flag": torch.tensor(True), "use_rslora_flag": torch.tensor(rank_scaled)}
    magnitude = {f"{STEM}.dora_layer.weight": torch.ones(3840)}
    save_file(pair(STEM, 3840, 3840) | magnitude | flags, tmp_path / "a.safetensors")
    found = zm.inspect(tmp_path / "a.safetensors")
    assert found.adapter is not None and found.accepted_by
    assert found.adapter.kinds == {"DoRA": 1} and found.adapter.unmatched == []
    assert found.adapter.rank_scaled is rank_scaled


@pytest.mark.parametrize(
    ("stem", "model"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv", "Flux"),
        ("transformer.single_transformer_blocks.3.attn.to_q", "Flux"),
        ("lora_unet_input_blocks_4_1_transformer_blocks_7_attn1_to_q", "Stable Diffusion XL"),
        (
            "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
            "Stable Diffusion",
        ),
        ("transformer.transformer_blocks.0.img_mlp.net.0.proj", "Qwen-Image"),
        ("diffusion_model.blocks.0.self_attn.q", "Wan"),
    ],
)
def test_adapters_of_other_models_are_named(stem: str, model: str, tmp_path: Path, capsys) -> None:
    save_file(pair(stem, 64, 64), tmp_path / "a.safetensors")
    found = zm.inspect(tmp_path / "a.safetensors")
    assert found.adapter is not None
    assert (found.adapter.model, found.adapter.fitting) == (model, 0)
    assert f"for {model}" in found.kind
    assert found.accepted_by == []
    assert found.refusal.startswith("it does not fit this model: it is LoRA of rank 2 for ")
    assert f" for {model}, names begin with " in found.refusal
    assert found.refusal.endswith("; use it with the model that it was trained for")
    assert main(["inspect", str(tmp_path / "a.safetensors")]) == 0
    assert "no command takes it" in capsys.readouterr().out


def test_an_adapter_for_a_model_of_other_widths(tmp_path: Path, capsys) -> None:
    save_file(pair("transformer.layers.0.attention.to_q", 256, 256), tmp_path / "a.safetensors")
    found = zm.inspect(tmp_path / "a.safetensors")
    assert found.adapter is not None
    assert (found.adapter.fitting, found.adapter.resized) == (0, 1)
    assert main(["inspect", str(tmp_path / "a.safetensors")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "fits no released Z-Image, perhaps one of other widths" in shown
    assert (
        "no command takes it with the released Z-Image: the adapter of "
        '"transformer.layers.0.attention.to_q" is for a layer of 256 x 256, not 3840 x 3840; use '
        "it with a Z-Image of its widths"
    ) in shown


def test_an_adapter_of_a_type_that_is_not_supported(tmp_path: Path) -> None:
    save_file({"layers.4.attention.out.oft_blocks": torch.zeros(4, 4)}, tmp_path / "a.safetensors")
    found = zm.inspect(tmp_path / "a.safetensors")
    assert found.accepted_by == []
    assert found.refusal == (
        'it is OFT (tensor "layers.4.attention.out.oft_blocks"), which is not supported; merge it '
        "into the original weights with the program that trained it"
    )


A, B, ALPHA = (f"{STEM}.{each}" for each in ("lora_A.weight", "lora_B.weight", "alpha"))
CHANGES = {
    "nothing": ({}, ""),
    "rank 0": ({A: torch.ones(0, 3840), B: torch.ones(3840, 0)}, "has down of shape [0, 3840]"),
    "two ranks": ({A: torch.ones(3, 3840)}, "has down of rank 3 and up of rank 2"),
    "alpha NaN": ({ALPHA: torch.tensor(torch.nan)}, "has alpha nan; export it again"),
    "alpha infinite": ({ALPHA: torch.tensor(torch.inf)}, "has alpha inf"),
    "alpha an integer": ({ALPHA: torch.tensor(4)}, ""),
    "two alphas": ({ALPHA: torch.ones(2)}, "has an alpha of shape [2]"),
    "an alpha in a matrix": ({ALPHA: torch.ones(1, 1, dtype=torch.int64)}, ""),
    "a convolution": ({A: torch.ones(2, 3840, 1, 1)}, "has down of shape [2, 3840, 1, 1]"),
    "integers": ({A: torch.ones(2, 3840, dtype=torch.int8)}, "is I8 [2, 3840]"),
    "many axes": ({f"{STEM}.diff": torch.ones([1] * 63)}, "has 63 axes"),
    "a long side": ({A: torch.ones(0, 1 << 40)}, "the longest of 1,099,511,627,776"),
    "a number": ({f"{STEM[:-1]}k.diff": torch.ones(())}, "has diff of shape [], which is not"),
    "NaN": ({A: torch.full((2, 3840), torch.nan)}, "has NaN or infinite numbers in down"),
    "a magnitude": ({f"{STEM}.dora_scale": torch.ones(7)}, "has a magnitude of shape [7]"),
    "a short bias": ({f"{STEM}.diff_b": torch.ones(7)}, "has a bias of 7 elements, not 3840"),
    "two spellings": (pair(STEM, 3840, 3840, 2, ("lora_down", "lora_up")), "two tensors for one"),
    "one of another width": (pair("transformer.layers.1.attention.to_q", 64, 64), "64 x 64"),
    "all of another width": (pair(STEM, 64, 64), "64 x 64"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_it_is_accepted_if_it_can_be_loaded(change: str, tmp_path: Path) -> None:
    tensors, clause = CHANGES[change]
    file = tmp_path / "a.safetensors"
    save_file(pair(STEM, 3840, 3840) | tensors, file)
    found = zm.inspect(file)
    assert found.adapter is not None
    with contextlib.nullcontext() if not clause else pytest.raises(zm.CheckpointError):
        list(open_adapter(file, zimage_shapes()).branches())
    assert bool(found.accepted_by) != bool(clause) == bool(found.refusal)
    assert clause in found.refusal


def test_a_magnitude_per_column_can_only_be_merged(tmp_path: Path) -> None:
    magnitude = {f"{STEM}.dora_scale": torch.ones(1, 3840)}
    save_file(pair(STEM, 3840, 3840) | magnitude, tmp_path / "a.safetensors")
    assert zm.inspect(tmp_path / "a.safetensors").accepted_by == ["convert, merge-lora, validate"]


def test_settings_in_the_header_that_are_none(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file(pair(STEM, 3840, 3840), file, {"lora_adapter_metadata": "[]"})
    assert (
        "lora_adapter_metadata in its header that is not a JSON object" in zm.inspect(file).refusal
    )


def test_other_files_have_no_adapter(small_file: Path) -> None:
    assert zm.inspect(small_file).adapter is None
