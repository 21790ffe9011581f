"""Bad adapters in every use: one sentence, the right exit code, nothing written or changed."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import zimage_mxfp8 as zm
from helpers import adapter_files as af
from helpers.commands import only
from helpers.diffusers_reference import make_reference, random_inputs
from programs.fuzz_headers import mutated
from zimage_mxfp8.adapters.files import open_adapter
from zimage_mxfp8.cli.main import main
from zimage_mxfp8.zimage.layers import zimage_shapes

Tensors = dict[str, torch.Tensor]
INPUTS = random_inputs([(4, 4)], [5])
STEM = "diffusion_model.layers.0.attention.out"
NORM = "layers.0.attention_norm1"
ONES = torch.ones(256)
A, B, ALPHA = f"{STEM}.lora_A.weight", f"{STEM}.lora_B.weight", f"{STEM}.alpha"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "transformer"
    make_reference(dim=256, layers=1).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> zm.ZImageTransformer:
    return zm.ZImageTransformer.from_checkpoint(folder, "cpu", dtype=torch.float32)


def pair(rank: int = 4, rows: int = 256, columns: int = 256, stem: str = STEM) -> Tensors:
    return {
        f"{stem}.lora_A.weight": af.random(rank, columns),
        f"{stem}.lora_B.weight": af.random(rows, rank),
    }


def with_nan(tensors: Tensors, name: str = B, value: float = math.nan) -> Tensors:
    """Return the tensors with a value in the middle of the one of that name."""
    changed = tensors[name].clone()
    changed.view(-1)[changed.numel() // 2] = value
    return tensors | {name: changed}


def lokr(left: float = 1.0, right: float = 1.0) -> Tensors:
    return {
        f"{STEM}.lokr_w1": torch.full((4, 4), left),
        f"{STEM}.lokr_w2": torch.full((64, 64), right),
    }


def loha(up: float = 1.0, rank: int = 2) -> Tensors:
    return {
        f"{STEM}.hada_w{i}_{part}": tensor
        for i in (1, 2)
        for part, tensor in (
            ("a", torch.full((256, rank), up)),
            ("b", torch.full((rank, 256), 1e-20)),
        )
    }


def dora() -> Tensors:
    return pair() | {f"{STEM}.dora_scale": torch.ones(256, 1)}


# What the adapter has -> its tensors, and what the sentence says of them.
BAD: dict[str, tuple[Tensors, tuple[str, ...]]] = {
    "NaN": (with_nan(pair()), ("layers.0.attention.out", "has NaN or infinite numbers in up")),
    **{
        f"{value} in {role}": (
            with_nan(tensors, f"{stem}.{ending}", value),
            (stem.removeprefix("diffusion_model."), f"has NaN or infinite numbers in {role}"),
        )
        for value, stem, ending, role, tensors in (
            (math.inf, STEM, "lora_A.weight", "down", pair()),
            (math.nan, STEM, "lora_B.bias", "up_bias", pair() | {f"{STEM}.lora_B.bias": ONES}),
            (math.inf, STEM, "dora_scale", "magnitude", dora()),
            (math.nan, STEM, "lokr_w2", "lokr_w2", lokr()),
            (math.nan, STEM, "hada_w1_a", "hada_w1_a", loha()),
            (math.nan, STEM, "diff", "diff", {f"{STEM}.diff": torch.ones(256, 256)}),
            (math.inf, NORM, "diff", "diff", {f"{NORM}.diff": ONES}),
            (math.nan, "cap_embedder.1", "diff_b", "diff_bias", {"cap_embedder.1.diff_b": ONES}),
        )
    },
    **{
        f"{what} product": (
            tensors,
            ("layers.0.attention.out", "so large that their products may overflow"),
        )
        for what, tensors in (
            ("LoRA", pair() | {A: torch.full((4, 256), 1e30), B: torch.full((256, 4), 1e30)}),
            ("LoKr", lokr(1e30, 1e30)),
            ("split LoKr", {
                f"{STEM}.lokr_w1": torch.full((4, 4), 1e30),
                f"{STEM}.lokr_w2_a": torch.full((64, 2), 1e30),
                f"{STEM}.lokr_w2_b": torch.full((2, 64), 1e-30),
            }),
            ("LoKr's first", {
                f"{STEM}.lokr_w1_a": torch.full((4, 2), 1e30),
                f"{STEM}.lokr_w1_b": torch.full((2, 4), 1e30),
                f"{STEM}.lokr_w2": torch.full((64, 64), 1e-30),
            }),
            ("LoHa", loha(1e20)),
            ("LoHa of high rank", loha(1e35, 40)),
            ("DoRA", dora() | {A: torch.full((4, 256), 1e10), B: torch.full((256, 4), 1e10)}),
        )
    },
    "rank 0": (pair(0), ("layers.0.attention.out", "of shape [0, 256]")),
    "two ranks": (pair() | {B: af.random(256, 8)}, ("down of rank 4 and up of rank 8",)),
    "no up": ({A: af.random(4, 256)}, ("has down without up", "export it again")),
    "alpha alone": ({ALPHA: torch.tensor(4.0)}, ("layers.0.attention.out", "has alpha alone")),
    "alpha inf": (pair() | {ALPHA: torch.tensor(float("inf"))}, ("has alpha inf",)),
    "alpha NaN": (pair() | {ALPHA: torch.tensor(float("nan"))}, ("has alpha nan",)),
    "two alphas": (pair() | {ALPHA: torch.ones(2)}, ("an alpha of shape [2]",)),
    "huge alpha": (
        pair(1) | {ALPHA: torch.tensor(3e38), B: torch.full((256, 1), 9.0)},
        ("becomes infinite with its alpha",),
    ),
    "rows": (pair(rows=128), ("is for a layer of 128 x 256, not 256 x 256", "trained for")),
    "columns": (pair(columns=3840), ("256 x 3840, not 256 x 256", "trained for")),
    "three axes": (pair() | {A: af.random(4, 256, 1)}, ("of shape [4, 256, 1]", "not a matrix")),
    "bias": (pair() | {f"{STEM}.lora_B.bias": torch.ones(7)}, ("a bias of 7 elements",)),
    "magnitude": (pair() | {f"{STEM}.dora_scale": torch.ones(5)}, ("a magnitude of shape [5]",)),
    "two names of one role": (
        {
            name.replace(".weight", f".{own}.weight"): tensor
            for own in ("default", "other")
            for name, tensor in pair().items()
        },
        ("two tensors for one place", ".default.weight", ".other.weight"),
    ),
    "integers": (
        pair() | {A: torch.ones(4, 256, dtype=torch.int32)},
        (A, "I32 [4, 256], and only single numbers", "F32"),
    ),
    "FP8": (pair() | {A: torch.ones(4, 256).to(torch.float8_e4m3fn)}, (A, "dtype F8_E4M3")),
    "OFT": ({f"{STEM}.oft_blocks": torch.zeros(4, 64, 64)}, ("is OFT", "oft_blocks")),
    "GLoRA": ({f"{STEM}.a1.weight": torch.ones(4, 256)} | pair(), ("is GLoRA", "a1.weight")),
    "another shape": (
        pair() | {f"{STEM}.reshape_weight": torch.tensor([256, 300])},
        ("is an adapter of a weight of another shape", "reshape_weight"),
    ),
    "flag": (
        pair() | {"use_rslora_flag": torch.ones(2, dtype=torch.bool)},
        ("BOOL [2], and only single numbers",),
    ),
    "flag NaN": (pair() | {"use_rslora_flag": torch.tensor(math.nan)}, ("flag", "is NaN")),
    "Tucker": (pair() | {f"{STEM}.lora_mid.weight": torch.ones(4, 4)}, ("Tucker",)),
    "Flux": (
        pair(stem="lora_unet_double_blocks_0_img_attn_qkv"),
        ("does not fit this model", "LoRA of rank 4 for Flux", "trained for"),
    ),
    "SDXL": (
        pair(stem="lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q"),
        ("for Stable Diffusion XL",),
    ),
    "text encoder": (
        pair(stem="lora_te_layers_0_self_attn_q_proj"),
        ("changes the text encoder alone",),
    ),
    "10,000 keys": (
        {f"x.{i}.lora_A.weight": torch.ones(1, 1) for i in range(10_000)},
        ("does not fit this model",),
    ),
    "one bad of many": (
        pair(stem="layers.0.feed_forward.w2", columns=682) | with_nan(pair()),
        ("has NaN",),
    ),
}  # fmt: skip


def entry(name: str, begin: int) -> str:
    """A tensor of rank 1 in a header."""
    shape = [1, 256] if name == A else [256, 1]
    value = {"dtype": "F32", "shape": shape, "data_offsets": [begin, begin + 1024]}
    return f"{json.dumps(name)}: {json.dumps(value)}"


def write_raw(path: Path, *entries: str, size: int | None = None) -> None:
    """Write a file of two tensors; its header has these entries, and states a size if given."""
    header = "{" + ", ".join(entries) + "}"
    begin = struct.pack("<Q", len(header) if size is None else size)
    path.write_bytes(begin + header.encode() + bytes(2048))


FILES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "missing": (lambda path: None, ("does not exist",)),
    "empty file": (lambda path: path.write_bytes(b""), ("is empty",)),
    "no tensors": (lambda path: save_file({}, path), ("has no tensors",)),
    "folder": (lambda path: path.mkdir(), ("is a folder, and an adapter is a file",)),
    "pickle": (lambda path: torch.save({"a": torch.ones(1)}, path), ("PyTorch pickle",)),
    "text": (lambda path: path.write_text("Entry not found"), ("is a text file",)),
    "truncated": (
        lambda path: (save_file(pair(), path), path.write_bytes(path.read_bytes()[:-1])),
        ("in.safetensors",),
    ),
    "a name twice in the header": (
        lambda path: write_raw(path, entry(A, 0), entry(A, 0), entry(B, 1024)),
        (f'has the name "{A}" twice in its header',),
    ),
    "huge header": (
        lambda path: write_raw(path, entry(A, 0), entry(B, 1024), size=1 << 62),
        ("is not a safetensors file: it does not begin with a header's size",),
    ),
    "header that is no JSON": (
        lambda path: save_file(pair(), path, {"lora_adapter_metadata": "{"}),
        ("lora_adapter_metadata", "not a JSON object"),
    ),
    "alpha in the header": (
        lambda path: save_file(
            pair(), path, {"lora_adapter_metadata": json.dumps({"lora_alpha": 10**400})}
        ),
        ("has alpha inf",),
    ),
}  # fmt: skip


def check(path: Path, parts: tuple[str, ...], folder: Path, model, capsys) -> None:
    """Every use of an adapter says the same, and leaves everything as it was."""
    before = model(*INPUTS).sample
    names = sorted(x.name for x in path.parent.iterdir())
    for command in (
        ["convert", str(folder), "-o", str(path.parent / "out.safetensors")],
        ["convert", str(folder), "-o", str(path.parent / "out.safetensors"), "--dry-run"],
        ["merge-lora", str(folder), str(path.parent / "out.safetensors")],
    ):
        capsys.readouterr()
        assert main([*command, "--lora", str(path)]) == 1, command
        out, err = capsys.readouterr()
        (line,) = err.splitlines()
        assert out == "" and len(line) < 600
        for part in ("in.safetensors", *parts):
            assert part in line, (part, line)
        only(path.parent, *names)
    with pytest.raises(zm.CheckpointError) as caught:
        model.load_lora(path)
    for part in parts:
        assert part in str(caught.value)
    assert model.loras == {}
    assert all(torch.equal(x, y) for x, y in zip(model(*INPUTS).sample, before, strict=True))


@pytest.mark.parametrize("what", BAD)
def test_bad_tensors(what: str, folder: Path, model, tmp_path: Path, capsys) -> None:
    tensors, parts = BAD[what]
    save_file({name: x.clone() for name, x in tensors.items()}, tmp_path / "in.safetensors")
    check(tmp_path / "in.safetensors", parts, folder, model, capsys)
    assert main(["inspect", str(tmp_path / "in.safetensors")]) == 0
    with pytest.raises(zm.CheckpointError) as caught:
        model.load_lora(tensors)
    assert "\n" not in str(caught.value)
    assert model.loras == {}


@pytest.mark.parametrize("what", FILES)
def test_bad_files(what: str, folder: Path, model, tmp_path: Path, capsys) -> None:
    make, parts = FILES[what]
    make(tmp_path / "in.safetensors")
    check(tmp_path / "in.safetensors", parts, folder, model, capsys)


def test_a_model_with_an_adapter_stays_as_it_is(folder: Path, tmp_path: Path) -> None:
    """Output, adapters and weights, whatever was bad in the next one."""
    model = zm.ZImageTransformer.from_checkpoint(folder, "cpu", dtype=torch.float32)
    plain = model(*INPUTS).sample
    model.load_lora(pair() | {f"{NORM}.diff": ONES, "cap_embedder.1.diff_b": ONES}, "a", 0.5)
    before, loras = model(*INPUTS).sample, dict(model.loras)
    assert not torch.equal(before[0], plain[0])
    sources: list[Path | Tensors] = [tensors for tensors, _ in BAD.values()]
    for i, (make, _) in enumerate(FILES.values()):
        path = tmp_path / str(i) / "in.safetensors"
        path.parent.mkdir()
        make(path)
        sources.append(path)
    for source in sources:
        with pytest.raises(zm.CheckpointError):
            model.load_lora(source, "b")
        assert dict(model.loras) == loras
        assert all(torch.equal(x, y) for x, y in zip(model(*INPUTS).sample, before, strict=True))


def test_10000_keys_beside_good_ones(folder: Path) -> None:
    model = zm.ZImageTransformer.from_checkpoint(folder, "cpu", dtype=torch.float32)
    many = {f"layers.{i}.ffn.lora_A.weight": torch.ones(4, 256) for i in range(10_000)}
    before = model(*INPUTS).sample
    loaded = model.load_lora(pair() | many)
    after = model(*INPUTS).sample
    model.unload_lora(loaded.name)
    assert (loaded.layers, set(loaded.unmatched)) == (1, set(many))
    model.load_lora(pair())
    assert torch.equal(model(*INPUTS).sample[0], after[0])
    assert not torch.equal(before[0], after[0])


def test_a_checkpoint_as_adapter(folder: Path, model, tmp_path: Path, capsys) -> None:
    content = (folder / "diffusion_pytorch_model.safetensors").read_bytes()
    (tmp_path / "in.safetensors").write_bytes(content)
    parts = ("is not an adapter", "no LoRA tensors", "give the file that a trainer")
    check(tmp_path / "in.safetensors", parts, folder, model, capsys)


def test_an_adapter_as_checkpoint(folder: Path, tmp_path: Path, capsys) -> None:
    save_file(pair(), tmp_path / "a.safetensors")
    adapter = str(tmp_path / "a.safetensors")
    for command in (
        ["convert", adapter, "-o", str(tmp_path / "out.safetensors"), "--lora", adapter],
        ["merge-lora", adapter, str(tmp_path / "out.safetensors"), "--lora", adapter],
    ):
        capsys.readouterr()
        assert main(command) == 1
        error = capsys.readouterr().err
        assert "is an adapter, not a model: LoRA of rank 4 for Z-Image" in error
        assert "give this file to convert, merge-lora or generate with --lora" in error
    only(tmp_path, "a.safetensors")


def write_with_a_row_of_zeros(folder: Path, output: Path) -> None:
    """Write the model with row 7 of one layer zero."""
    shutil.copytree(folder, output)
    tensors = load_file(output / "diffusion_pytorch_model.safetensors")
    tensors["layers.0.attention.to_out.0.weight"][7] = 0
    save_file(tensors, output / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("change", [B, None], ids=["no change of the row", "a change"])
def test_dora_of_a_row_of_zeros(change: str | None, folder: Path, tmp_path: Path) -> None:
    """At weight 0, which can be set at any time, its norm is 0."""
    write_with_a_row_of_zeros(folder, tmp_path / "zero")
    model = zm.ZImageTransformer.from_checkpoint(tmp_path / "zero", "cpu", dtype=torch.float32)
    before = model(*INPUTS).sample
    adapter = dora() | ({change: torch.zeros(256, 4)} if change else {})
    with pytest.raises(zm.CheckpointError, match=r"attention\.out.*that of row 7 is 0"):
        model.load_lora(adapter)
    assert model.loras == {}
    assert all(torch.equal(x, y) for x, y in zip(model(*INPUTS).sample, before, strict=True))


def test_what_cannot_be_merged_into_the_weights(folder: Path, tmp_path: Path, capsys) -> None:
    """A bias for a layer without one, an overflow, DoRA of rows of zeros."""
    bias = pair() | {f"{STEM}.lora_B.bias": torch.ones(256)}
    write_with_a_row_of_zeros(folder, tmp_path / "zero")
    for tensors, weight, source, part in (
        (bias, 1, folder, "changes a bias, which the layer does not have"),
        (pair(), 1e300, folder, "becomes NaN or infinite at row"),
        (
            dora() | {B: torch.zeros(256, 4)},
            1,
            tmp_path / "zero",
            "becomes NaN or infinite at row 7, column 0",
        ),
    ):
        save_file(tensors, tmp_path / "a.safetensors")
        for command in ("convert", "merge-lora"):
            words = [command, str(source), str(tmp_path / "out.safetensors")]
            capsys.readouterr()
            assert main([*words, "--lora", f"{tmp_path / 'a.safetensors'}:{weight}"]) == 1
            assert part in capsys.readouterr().err
            only(tmp_path, "a.safetensors", "zero")


def test_settings_take_a_link_to_itself(tmp_path: Path) -> None:
    """Reading it tells what is wrong."""
    loop = tmp_path / "loop.safetensors"
    loop.symlink_to(loop.name)
    assert zm.GenerationSettings("a", loras=[(loop, 1)]).loras == ((loop, 1.0),)


def test_wrong_usage(folder: Path, tmp_path: Path, capsys) -> None:
    save_file(pair(), tmp_path / "a.safetensors")
    adapter, output = tmp_path / "a.safetensors", tmp_path / "out.safetensors"
    for words in (
        ["convert", str(folder), str(output), "--lora", ""],
        ["convert", str(folder), str(output), "--lora", f"{adapter}:inf"],
        ["convert", str(folder), str(output), "--zimage", "--lora", str(adapter)],
        ["merge-lora", str(folder), str(output)],
    ):
        assert main(words) == 2, words
    words = ["merge-lora", str(folder), str(adapter), "--lora", str(adapter), "--overwrite"]
    assert main(words) == 2
    assert "a.safetensors" in capsys.readouterr().err
    for loras in ("a", 3, [3], [("a", "b")], [("a", float("nan"))], [("a", 1, 2)], None):
        with pytest.raises(zm.UsageError, match="loras"):
            zm.ConversionOptions(loras=loras)  # type: ignore[arg-type]
        with pytest.raises(zm.UsageError, match="loras"):
            zm.merge_loras(folder, output, loras)  # type: ignore[arg-type]
    with pytest.raises(zm.UsageError, match="that must be within 1,000,000 of 0"):
        zm.GenerationSettings("a", loras=[(adapter, -1e7)])
    with pytest.raises(zm.UsageError, match=r"a\.safetensors that must be within 1,000,000 of 0"):
        zm.GenerationSettings("a", loras=[(adapter, 6e5), (str(adapter), 6e5)])
    with pytest.raises(zm.UsageError, match="loras"):
        zm.merge_loras(folder, output, [])
    other = {"blocks.0.self_attn.q.weight": torch.ones(64, 64)}
    save_file(other, tmp_path / "wan.safetensors")
    with pytest.raises(zm.UsageError, match="loras can be merged into a Z-Image only"):
        zm.convert(tmp_path / "wan.safetensors", output, any_model=True, loras=[adapter])
    only(tmp_path, "a.safetensors", "wan.safetensors")


def test_mutated_files(tmp_path: Path) -> None:
    """A result or one sentence, whatever the header says."""
    shapes = zimage_shapes(256, 1, 1, 96)
    tensors = pair() | pair(stem="lora_unet_layers_0_feed_forward_w1", rows=682)
    tensors |= {ALPHA: torch.tensor(2.0), f"{STEM}.dora_scale": torch.ones(256, 1)}
    tensors |= {"layers.0.attention.to_q.lokr_w1": torch.ones(4, 4)}
    tensors |= {"layers.0.attention.to_q.lokr_w2": torch.ones(64, 64)}
    tensors |= {f"layers.0.attention.to_k.hada_w{i}_a": torch.ones(256, 2) for i in (1, 2)}
    tensors |= {f"layers.0.attention.to_k.hada_w{i}_b": torch.ones(2, 256) for i in (1, 2)}
    tensors |= {"layers.0.ffn_norm1.diff": torch.ones(256), "x_embedder.diff_b": torch.ones(256)}
    save_file(tensors, tmp_path / "good.safetensors")
    content, path = (tmp_path / "good.safetensors").read_bytes(), tmp_path / "in.safetensors"
    outcomes = {True: 0, False: 0}
    for seed in range(400):
        path.write_bytes(mutated(content, seed))
        try:
            list(open_adapter(path, shapes).branches())
            outcomes[True] += 1
        except zm.Error as error:
            outcomes[False] += 1
            assert "\n" not in str(error) and str(error)
        zm.inspect(path)
    assert min(outcomes.values()) > 20


def test_any_arrays_as_an_adapter() -> None:
    shapes = zimage_shapes(256, 1, 1, 96)
    rng = random.Random(0)
    arrays = (
        *(np.zeros(()), np.zeros(0), np.ones((4, 256)), np.ones((256, 4)), np.full(3, np.inf)),
        *(np.array("x"), np.array([None]), np.ones(2, np.complex64), np.ones(4, bool), "x", None),
    )
    endings = (".lora_A.weight", ".lora_B.weight", ".alpha", ".dora_scale", ".lokr_w1", ".diff")
    stems = (STEM, "lora_unet__layers_0_attention_out", "x_embedder")
    for _ in range(500):
        made = {
            rng.choice(stems) + rng.choice(endings): rng.choice(arrays)
            for _ in range(rng.randrange(4))
        }
        try:
            list(open_adapter(made, shapes).branches())
        except zm.Error as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        (
            {"lokr_w1": (16, 16), "lokr_w2": (16, 16), "dora_scale": (256, 1)},
            "is LoKr with magnitude, which is not supported",
        ),
        (
            {
                "hada_w1_a": (256, 2),
                "hada_w1_b": (2, 256),
                "hada_w2_a": (256, 2),
                "hada_w2_b": (2, 256),
                "dora_scale": (256, 1),
            },
            "is LoHa with magnitude, which is not supported",
        ),
        (
            {"lora_A.weight": (4, 256), "lora_B.weight": (256, 4), "diff": (256, 256)},
            "is LoRA with diff, which is not supported",
        ),
        ({"dora_scale": (256, 1)}, "has magnitude alone"),
    ],
)
def test_parts_that_would_be_dropped_are_refused(tensors, sentence: str) -> None:
    module = "layers.0.attention.to_q"
    adapter = {f"{module}.{name}": np.ones(shape, np.float32) for name, shape in tensors.items()}
    file = open_adapter(adapter, zimage_shapes(256))
    with pytest.raises(zm.CheckpointError, match=f'"{module}" {sentence}'):
        list(file.branches())


def test_a_norm_has_no_bias() -> None:
    adapter = {"layers.0.attention_norm1.b_norm": np.ones(256, np.float32)}
    file = open_adapter(adapter, zimage_shapes(256))
    with pytest.raises(zm.CheckpointError, match="has a bias, and the layer is a norm"):
        list(file.branches())


@pytest.mark.parametrize(
    "pattern",
    [
        "to_q",
        r"layers\.[01]\.attention\.to_q",
        "^layers.0.attention.to_q",
        "(a+)+$",
        "[",
        "x" * 300,
    ],
)
def test_patterns_of_alpha_are_those_of_peft(pattern: str) -> None:
    from peft.utils.other import get_pattern_key

    module = "layers.0.attention.to_q"
    adapter = {
        f"{module}.lora_A.weight": np.ones((4, 256), np.float32),
        f"{module}.lora_B.weight": np.ones((256, 4), np.float32),
    }
    settings = {"lora_alpha": 4, "alpha_pattern": {pattern: 16}}
    ((_, branch),) = open_adapter(adapter, zimage_shapes(256), settings).branches()
    try:
        fits = get_pattern_key([pattern], module) == pattern
    except re.error:
        fits = False
    assert branch.matrix.up.max() == (4.0 if fits else 1.0)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("in_file", [True, False])
def test_an_alpha_may_have_any_dtype_and_shape(
    shape: tuple[int, ...], dtype: torch.dtype, in_file: bool, tmp_path: Path
) -> None:
    adapter = pair() | {f"{STEM}.alpha": torch.full(shape, 8, dtype=dtype)}
    save_file(adapter, tmp_path / "adapter.safetensors")
    source = tmp_path / "adapter.safetensors" if in_file else adapter
    ((_, branch),) = open_adapter(source, zimage_shapes(256)).branches()
    ((_, plain),) = open_adapter(pair(), zimage_shapes(256)).branches()
    np.testing.assert_array_equal(branch.matrix.up, 2 * plain.matrix.up)


@pytest.mark.parametrize("change", [lambda x: x.to("meta"), lambda x: x.to_sparse()])
def test_tensors_without_dense_data(change) -> None:
    file = open_adapter(pair() | {A: change(pair()[A])}, zimage_shapes(256))
    with pytest.raises(zm.CheckpointError, match=f'"{A}" has no dense data'):
        list(file.branches())
