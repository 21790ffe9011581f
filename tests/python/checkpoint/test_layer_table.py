"""A made-up relative of Z-Image, which only its table of layers tells apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from helpers.checkpoints import Tensors, random_tensors
from helpers.diffusers_reference import (
    make_reference,
    random_inputs,
    relative_error,
    to_diffusers_names,
)
from zimage_mxfp8.analysis.probe.grouping import Weight, decide
from zimage_mxfp8.analysis.probe.run import _targets
from zimage_mxfp8.analysis.probe.scoring import ProbeRules, Thresholds
from zimage_mxfp8.analysis.probe.weight_metrics import WeightMetrics
from zimage_mxfp8.analysis.sensitivity.run import groups_of
from zimage_mxfp8.analysis.sensitivity.targets import find_targets
from zimage_mxfp8.checkpoint.diffusers_layout import to_comfyui_layout
from zimage_mxfp8.checkpoint.identify import _part_pattern
from zimage_mxfp8.checkpoint.scopes import find_scopes, group_of
from zimage_mxfp8.checkpoint.source import SourceTensor, TensorReader, open_checkpoint
from zimage_mxfp8.checkpoint.structure import missing_or_misshapen
from zimage_mxfp8.conversion.recipes import rules_outside_blocks
from zimage_mxfp8.transformer.loading import LoadedWeights, load_parts
from zimage_mxfp8.transformer.model import ZImageTransformer
from zimage_mxfp8.transformer.model_file import ModelFile
from zimage_mxfp8.zimage.config import ZImageConfig
from zimage_mxfp8.zimage.layers import ZIMAGE
from zimage_mxfp8.zimage.rows import Layer, Size, Stack, TokenKind

FAMILY = replace(
    ZIMAGE,
    sizes=(*ZIMAGE.sizes, Size("style_dim", lambda _: 512, (("style_embedder.weight", 1),))),
    stacks=(
        *ZIMAGE.stacks[:2],
        Stack("extra_refiner", "n_extra_layers", "image", modulated=True, title="extra "),
        *ZIMAGE.stacks[2:],
    ),
    outside=(
        *ZIMAGE.outside,
        Layer(
            "style_embedder",
            "linear",
            lambda s: (s["dim"], s["style_dim"]),
            bias=True,
            group="embedders",
        ),
    ),
    diffusers_modules=(*ZIMAGE.diffusers_modules, ("all_style_embedder.2-1", "style_embedder")),
)
DIM, HIDDEN, CAPTION, STYLE = 256, 320, 96, 48
BLOCKS = {"noise_refiner": 1, "context_refiner": 1, "extra_refiner": 3, "layers": 2}


def written_by_hand() -> dict[str, tuple[int, ...]]:
    """The relative's tensors in ComfyUI's layout, without the table."""
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.weight": (DIM, 64),
        "x_embedder.bias": (DIM,),
        "style_embedder.weight": (DIM, STYLE),
        "style_embedder.bias": (DIM,),
        "cap_embedder.0.weight": (CAPTION,),
        "cap_embedder.1.weight": (DIM, CAPTION),
        "cap_embedder.1.bias": (DIM,),
        "t_embedder.mlp.0.weight": (1024, 256),
        "t_embedder.mlp.0.bias": (1024,),
        "t_embedder.mlp.2.weight": (256, 1024),
        "t_embedder.mlp.2.bias": (256,),
        "x_pad_token": (1, DIM),
        "cap_pad_token": (1, DIM),
        "final_layer.linear.weight": (64, DIM),
        "final_layer.linear.bias": (64,),
        "final_layer.adaLN_modulation.1.weight": (DIM, 256),
        "final_layer.adaLN_modulation.1.bias": (DIM,),
    }
    for stack, count in BLOCKS.items():
        for i in range(count):
            block = {
                "attention.qkv.weight": (3 * DIM, DIM),
                "attention.out.weight": (DIM, DIM),
                "attention.q_norm.weight": (128,),
                "attention.k_norm.weight": (128,),
                "feed_forward.w1.weight": (HIDDEN, DIM),
                "feed_forward.w2.weight": (DIM, HIDDEN),
                "feed_forward.w3.weight": (HIDDEN, DIM),
                "attention_norm1.weight": (DIM,),
                "attention_norm2.weight": (DIM,),
                "ffn_norm1.weight": (DIM,),
                "ffn_norm2.weight": (DIM,),
            }
            if stack != "context_refiner":
                block["adaLN_modulation.0.weight"] = (4 * DIM, 256)
                block["adaLN_modulation.0.bias"] = (4 * DIM,)
            shapes |= {f"{stack}.{i}.{name}": shape for name, shape in block.items()}
    return shapes


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return random_tensors(written_by_hand())


@pytest.fixture(scope="module")
def file(tensors: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("family") / "model.safetensors"
    save_file(tensors, path)
    return path


def in_diffusers_layout(tensors: Tensors) -> Tensors:
    """Diffusers' names, spelled out without the table."""
    renamed = {}
    for name, tensor in tensors.items():
        if ".attention.qkv." in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                renamed[name.replace(".qkv.", f".to_{part}.")] = rows.contiguous()
            continue
        for module in ("x_embedder", "style_embedder", "final_layer"):
            if name.startswith(f"{module}."):
                name = f"all_{module}.2-1.{name.removeprefix(f'{module}.')}"
        name = name.replace(".attention.out.", ".attention.to_out.0.")
        name = name.replace(".attention.q_norm.", ".attention.norm_q.")
        renamed[name.replace(".attention.k_norm.", ".attention.norm_k.")] = tensor
    return renamed


def as_torch(tensor: SourceTensor) -> torch.Tensor:
    with TensorReader() as reader:
        data = torch.from_numpy(reader.read(tensor).copy())
    return data.view(torch.bfloat16).reshape(tensor.shape)


def test_shapes_follow_from_the_tensors() -> None:
    assert FAMILY.expected_shapes(written_by_hand()) == written_by_hand()


def test_a_missing_tensor_of_a_new_row_is_named(tensors: Tensors, tmp_path: Path) -> None:
    path = tmp_path / "incomplete.safetensors"
    left_out = ("extra_refiner.1.feed_forward.w2.weight", "style_embedder.bias")
    save_file({n: t for n, t in tensors.items() if n not in left_out}, path)
    checkpoint = open_checkpoint(path)
    (scope,) = find_scopes(checkpoint.tensors, FAMILY)
    found = missing_or_misshapen(checkpoint, scope)
    assert found == [(name, "is missing") for name in left_out]


def test_diffusers_names_become_comfyui_names(tensors: Tensors, tmp_path: Path) -> None:
    path = tmp_path / "diffusers.safetensors"
    save_file(in_diffusers_layout(tensors), path)
    checkpoint = open_checkpoint(path)
    (scope,) = find_scopes(checkpoint.tensors, FAMILY)
    converted = to_comfyui_layout(checkpoint, scope)
    assert {n: t.shape for n, t in converted.tensors.items()} == written_by_hand()
    for name in ("extra_refiner.2.attention.qkv.weight", "style_embedder.weight"):
        assert torch.equal(as_torch(converted.tensors[name]), tensors[name])


def test_a_part_of_the_model_is_recognised_by_its_stack() -> None:
    name = "model.extra_refiner.0.attention.out.weight"
    assert _part_pattern(FAMILY).search(name)
    assert not _part_pattern(ZIMAGE).search(name)


def test_groups_of_tables(file: Path) -> None:
    (scope,) = find_scopes(open_checkpoint(file).tensors, FAMILY)
    assert group_of("extra_refiner.0.attention.q_norm.weight", scope) == "extra_refiner norms"
    name = "extra_refiner.0.adaLN_modulation.0.bias"
    assert group_of(name, scope) == "extra_refiner adaLN_modulation"
    assert group_of("style_embedder.weight", scope) == "embedders"


def test_bias_correction_knows_the_new_modulations() -> None:
    assert FAMILY.is_modulation("extra_refiner.2.adaLN_modulation.0")
    assert not FAMILY.is_modulation("context_refiner.0.adaLN_modulation.0")
    assert not ZIMAGE.is_modulation("extra_refiner.2.adaLN_modulation.0")


def test_probe_looks_at_the_new_stack(file: Path) -> None:
    checkpoint = open_checkpoint(file)
    (scope,) = find_scopes(checkpoint.tensors, FAMILY)
    found = _targets(checkpoint, scope)
    kinds = {kind for _, kind, _, stack in found if stack == "extra_refiner"}
    parts = ("attention.qkv", "attention.out", *(f"feed_forward.w{i}" for i in (1, 2, 3)))
    assert kinds == {f"extra_refiner.{part}" for part in parts}
    metrics = WeightMetrics(0.0, 1.0, 1.0, 0.0, 1.0)
    weights = [
        Weight(tensor.name, kind, block, stack, (DIM, DIM), 1, metrics, 0.5)
        for tensor, kind, block, stack in found
    ]
    _, groups = decide(weights, Thresholds(0.4, 0.9), ProbeRules(), FAMILY)
    positions = {g.position for g in groups if g.layer_type.startswith("extra_refiner.")}
    assert positions == {"all"}
    assert sum(group.count for group in groups) == len(found)


def test_recipes_keep_what_is_outside_the_stacks() -> None:
    style_only = replace(FAMILY, outside=FAMILY.outside[-1:])
    assert rules_outside_blocks(FAMILY) == rules_outside_blocks()
    assert rules_outside_blocks(style_only) == ()  # the built-in recipe does not know it


CONFIG = ZImageConfig(DIM, 2, 1, DIM // 128, CAPTION, HIDDEN)


@pytest.fixture(scope="module")
def weights(file: Path) -> LoadedWeights:
    checkpoint = open_checkpoint(file)
    return load_parts(
        ModelFile(checkpoint, CONFIG, checkpoint.tensors, {}),
        torch.device("cpu"),
        "weight-only",
        torch.float32,
        None,
        FAMILY,
    )


@pytest.fixture(scope="module")
def model(weights: LoadedWeights) -> ZImageTransformer:
    return ZImageTransformer(CONFIG, weights, "weight-only", torch.float32, False, FAMILY)


def test_the_new_rows_are_loaded(weights: LoadedWeights, tensors: Tensors) -> None:
    block = weights.blocks["extra_refiner"][2]
    gate_and_up = [tensors[f"extra_refiner.2.feed_forward.w{i}.weight"] for i in (1, 3)]
    assert torch.equal(block.ffn_in[0].weight, torch.cat(gate_and_up).float())
    qkv = tensors["extra_refiner.2.attention.qkv.weight"]
    assert torch.equal(block.qkv.weight, qkv.float())
    norm = tensors["extra_refiner.2.ffn_norm2.weight"]
    assert torch.equal(block.ffn_norm2, norm.float())
    assert torch.equal(
        weights.others["style_embedder.weight"], tensors["style_embedder.weight"].float()
    )


def test_sensitivity_finds_the_new_targets(model: ZImageTransformer, tensors: Tensors) -> None:
    targets = find_targets(model, FAMILY)
    matrices = {
        name.removesuffix(".weight"): tensor.shape
        for name, tensor in tensors.items()
        if name.split(".")[0] in BLOCKS and tensor.dim() == 2
    }
    assert {target.name: target.shape for target in targets} == matrices
    for target in targets:
        if target.module:
            weight = model.get_submodule(target.module).weight[slice(*target.rows)]
            assert torch.equal(weight, tensors[f"{target.name}.weight"].float())
    modulations = [target for target in targets if not target.module]
    assert [target.stack for target in modulations] == [
        "noise_refiner",
        *["extra_refiner"] * 3,
        *["layers"] * 2,
    ]
    assert [target.rows[0] for target in modulations] == [4 * DIM * i for i in range(6)]
    groups = groups_of(targets, FAMILY)
    assert len(groups["extra_refiner"]) == 3 * 6


@pytest.mark.parametrize(
    ("tokens", "modulated", "neighbour", "before"),
    [
        ("image", True, "noise_refiner", False),
        ("caption", False, "context_refiner", True),
        ("joint", True, "layers", True),
    ],
)
def test_a_new_stack_is_run(
    tokens: TokenKind, modulated: bool, neighbour: str, before: bool, tmp_path: Path
) -> None:
    """Its blocks are to compute what they do at the start or end of a stack of diffusers' model."""
    extra = Stack("extra", "n_extra_layers", tokens, modulated)
    stacks = (extra, *ZIMAGE.stacks) if before else (*ZIMAGE.stacks, extra)
    table = replace(ZIMAGE, stacks=stacks)
    counts = {"n_layers": 2, "n_refiner_layers": 1, "n_extra_layers": 3}
    shapes = table.shapes({"dim": DIM, "caption_dim": CAPTION}, counts)
    tensors = random_tensors(shapes, torch.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path / "model.safetensors")
    config = ZImageConfig(
        DIM, 2, 1, DIM // 128, CAPTION, shapes["layers.0.feed_forward.w1.weight"][0]
    )
    weights = load_parts(
        ModelFile(checkpoint, config, checkpoint.tensors, {}),
        torch.device("cpu"),
        "weight-only",
        torch.float32,
        None,
        table,
    )
    model = ZImageTransformer(config, weights, "weight-only", torch.float32, False, table)

    stack = {"noise_refiner": 1, "context_refiner": 1, "layers": 2}[neighbour]
    begin = {"extra": 0 if before else stack, neighbour: 3 if before else 0}
    joined = {}
    for name, tensor in tensors.items():
        first, _, rest = name.partition(".")
        if first in begin:
            number, _, rest = rest.partition(".")
            name = f"{neighbour}.{int(number) + begin[first]}.{rest}"
        joined[name] = tensor
    longest = make_reference(DIM, layers=5, refiners=4)
    for name, blocks in {"noise_refiner": 1, "context_refiner": 1, "layers": 2}.items():
        length = blocks + 3 if name == neighbour else blocks
        setattr(longest, name, getattr(longest, name)[:length])
    longest.load_state_dict(to_diffusers_names(joined), strict=True)
    inputs = random_inputs([(8, 12), (4, 4)], [5, 33])
    want = longest(*inputs, return_dict=False)[0]
    assert relative_error(model(*inputs).sample, want) < 1e-5  # the order of float32 sums
