"""Operations registered with torch.library, and layers that torch.compile and torch.export trace.

The CUDA operations are marked gpu; their shapes and dtypes are checked without one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import zimage_mxfp8 as zm
from zimage_mxfp8.transformer import linear, ops
from zimage_mxfp8.transformer.arithmetic import torch_library
from zimage_mxfp8.transformer.arithmetic.int8 import quantize_rotated
from zimage_mxfp8.transformer.compute import Compute
from zimage_mxfp8.transformer.epilogue import SiluMultiply

OPS = torch.ops.zimage_mxfp8
ROWS, WIDTH, HEADS = 5, 96, 2
SHAPES = {
    "bfloat16": [((ROWS, WIDTH), torch.bfloat16), ((0,), torch.bfloat16)],
    "row-scaled": [((ROWS, WIDTH), torch.float8_e4m3fn), ((ROWS,), torch.float32)],
    "mxfp8": [((32, WIDTH), torch.float8_e4m3fn), ((128, 4), torch.uint8)],
    "int8": [((ROWS, WIDTH), torch.int8), ((ROWS,), torch.float32)],
}


def random(*shape: int, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).bfloat16().to(device)


def parts(array: zm.MXFP8Array | zm.RowScaledArray) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes as bytes, because opcheck compares its arguments, and scales."""
    return array.codes.view(torch.uint8), array.scales


def codec_calls(device: str) -> dict[str, tuple[Any, ...]]:
    """Arguments of the operations that every device has."""
    x, weights = random(ROWS, WIDTH, device=device), random(64, WIDTH, seed=1, device=device)
    mxfp8, mxfp8_weights = zm.quantize(x), zm.quantize(weights)
    rows, row_weights = zm.quantize_rows(x), zm.quantize_rows(weights)
    stored = parts(mxfp8_weights)
    gemm = (*parts(mxfp8), ROWS, *stored, 64, WIDTH)
    fp8 = (*parts(rows), *parts(row_weights))
    in_int8 = [quantize_rotated(y) for y in (x, weights)]
    int8_operands = [part for y in in_int8 for part in (y.codes, y.scales)]
    return {
        "quantize": (x,),
        "quantize_rows": (x,),
        "quantize_int8": (x,),
        "dequantize": (*stored, 64, WIDTH, torch.float32),
        "gemm_weight_only": (x, *stored, 64, WIDTH),
        "gemm_row_scaled": (*fp8, torch.bfloat16),
        "gemm_row_scaled of int8": (*int8_operands, torch.bfloat16),
        "gemm_mxfp8": (*gemm, True, torch.bfloat16),
    }


def fused_calls(device: str) -> dict[str, tuple[Any, ...]]:
    """Arguments of the operations that only CUDA devices have."""
    x, y = random(ROWS, WIDTH, device=device), random(ROWS, WIDTH, seed=1, device=device)
    weight, scale = random(WIDTH, seed=2, device=device), random(2, WIDTH, seed=3, device=device)
    items = torch.tensor([0, 1, 1, 0, 1], dtype=torch.int32, device=device)
    head = random(128, seed=4, device=device)
    added = random(ROWS, WIDTH, seed=6, device=device), torch.full((1,), 0.5, device=device)
    qkv = random(ROWS, 3 * HEADS * 128, seed=5, device=device)
    rotations = torch.ones(ROWS, 64, 2, device=device)
    calls: dict[str, tuple[Any, ...]] = {
        "add_norm": (x, y, weight, scale, items, 1e-5, *added),
        "rotate_heads": (qkv, head, head, rotations, HEADS, HEADS, 1e-5),
    }
    for form in SHAPES:
        calls[f"silu_multiply {form}"] = (x, y, form)
        calls[f"norm_modulate {form}"] = (x, weight, scale, items, form, 1e-5)
        calls[f"add_norm_modulate {form}"] = (
            *(x, y, weight, scale, weight, None, items, form, 1e-5, *added),
        )
    return calls


def gemm_epilogue_calls(device: str) -> dict[str, tuple[Any, ...]]:
    """Arguments of the GEMM with an epilogue."""
    x = zm.quantize_rows(random(ROWS, WIDTH, device=device))
    weights = zm.quantize_rows(random(3 * HEADS * 128, WIDTH, seed=1, device=device))
    operands = (*parts(x), *parts(weights))
    head, rotations = random(128, seed=4, device=device), torch.ones(ROWS, 64, 2, device=device)
    down = zm.quantize_rows(random(64, WIDTH, seed=6, device=device))
    mxfp8 = zm.quantize(random(3 * HEADS * 128, WIDTH, seed=1, device=device))
    plain = random(ROWS, WIDTH, seed=9, device=device)
    narrow, up = random(ROWS, 32, seed=7, device=device), random(len(weights.codes), 32, seed=8)
    addend = (narrow, up.to(device))
    in_int8 = [
        quantize_rotated(random(rows, WIDTH, device=device)) for rows in (ROWS, len(weights.codes))
    ]
    int8_operands = tuple(part for x in in_int8 for part in (x.codes, x.scales))
    return {
        **{f"gemm_silu_multiply {form}": (*operands, None, None, form) for form in SHAPES},
        "gemm_silu_multiply of int8": (*int8_operands, None, None, "int8"),
        "gemm_rotate_heads of int8": (
            *(*int8_operands, None, None, head, head, rotations, HEADS, HEADS, 1e-5),
        ),
        "gemm_silu_multiply with an addend": (*operands, *addend, "row-scaled"),
        "gemm_rotate_heads": (*operands, None, None, head, head, rotations, HEADS, HEADS, 1e-5),
        "gemm_low_rank": (*operands, *addend),
        "gemm_low_rank of int8": (*int8_operands, *addend),
        "gemm_weight_only_low_rank": (plain, *parts(mxfp8), *addend),
        "narrow_gemm_plain": (plain, plain[:1].repeat(32, 1), torch.ones(32, device=device)),
        "narrow_gemm": (*parts(x), *parts(down), torch.ones(32, device=device)),
        "narrow_gemm of int8": (
            *(*int8_operands[:2], int8_operands[2][:64], int8_operands[3][:64]),
            torch.ones(32, device=device),
        ),
    }


def operation(call: str) -> Any:
    return getattr(OPS, call.split()[0]).default


@pytest.mark.parametrize("call", codec_calls("cpu"))
def test_opcheck(call: str) -> None:
    torch.library.opcheck(operation(call), codec_calls("cpu")[call])


@pytest.mark.gpu
@pytest.mark.parametrize("call", [*codec_calls("cpu"), *fused_calls("cpu")])
def test_opcheck_on_cuda(call: str) -> None:
    torch.library.opcheck(operation(call), (codec_calls("cuda") | fused_calls("cuda"))[call])


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="not Hopper",
)
@pytest.mark.parametrize("call", gemm_epilogue_calls("cpu"))
def test_opcheck_on_hopper(call: str) -> None:
    torch.library.opcheck(operation(call), gemm_epilogue_calls("cuda")[call])


def test_every_operation_is_checked() -> None:
    registered = {
        name for name, value in vars(torch_library).items() if hasattr(value, "register_fake")
    } | {f"gemm_{name}" for name in torch_library.GEMM_EPILOGUES}
    calls = codec_calls("cpu") | fused_calls("cpu") | gemm_epilogue_calls("cpu")
    assert registered == {call.split()[0] for call in calls}


def test_schemas_name_what_is_written() -> None:
    written = {}
    for call in codec_calls("cpu") | fused_calls("cpu") | gemm_epilogue_calls("cpu"):
        schema = operation(call)._schema
        written[schema.name] = [
            argument.name
            for argument in schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
    assert {name: names for name, names in written.items() if names} == {
        "zimage_mxfp8::add_norm": ["x"],
        "zimage_mxfp8::add_norm_modulate": ["x"],
        "zimage_mxfp8::rotate_heads": ["matrix"],
    }


@pytest.mark.parametrize("call", [call for call in fused_calls("cpu") if " " in call])
def test_fake_results_of_fused_operations(call: str) -> None:
    arguments = fused_calls("cpu")[call]
    with FakeTensorMode(allow_non_fake_inputs=True):
        results = operation(call)(*arguments)
    assert [(tuple(result.shape), result.dtype) for result in results] == SHAPES[call.split()[1]]


@pytest.mark.parametrize("form", SHAPES)
def test_fake_results_of_silu_multiply_as_an_epilogue(form: str) -> None:
    """As those of silu_multiply of half as many columns."""
    half = random(ROWS, 3 * HEADS * 128 // 2)
    arguments = gemm_epilogue_calls("cpu")[f"gemm_silu_multiply {form}"]
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = operation("gemm_silu_multiply")(*arguments)
        want = operation("silu_multiply")(half, half, form)
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in want]


def test_fake_result_of_rotate_heads_as_an_epilogue() -> None:
    arguments = gemm_epilogue_calls("cpu")["gemm_rotate_heads"]
    with FakeTensorMode(allow_non_fake_inputs=True):
        result = operation("gemm_rotate_heads")(*arguments)
    assert (tuple(result.shape), result.dtype) == ((ROWS, 3 * HEADS * 128), torch.bfloat16)


class TwoLayers(torch.nn.Module):
    """A linear layer, silu(gate) * up, and another layer, with a norm in front."""

    def __init__(self, compute: Compute, device: str) -> None:
        super().__init__()
        layers = []
        for shape in ((128, WIDTH), (80, 64)):
            encoded = zm.quantize(random(*shape, seed=shape[0], device=device))
            layer, _ = linear.quantized_linear(
                encoded.codes.view(torch.uint8), encoded.scales, shape[0], compute, torch.bfloat16
            )
            layers.append(layer)
        self.first, self.last = layers
        self.register_buffer("weight", random(WIDTH, seed=7, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = ops.norm_modulate(x, self.weight, None, None, self.first.input_formats)
        gated = self.first(normed, SiluMultiply(self.last.input_formats))
        return self.last(gated)


def assert_traced_equals_eager(compute: Compute, device: str) -> None:
    layers, x = TwoLayers(compute, device), random(ROWS, WIDTH, device=device)
    eager = layers(x)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    for each in (backend, "eager", "aot_eager"):
        torch._dynamo.reset()
        compiled = torch.compile(layers, backend=each, fullgraph=True)
        assert torch.equal(compiled(x), eager)
    exported = torch.export.export(layers, (x,))
    assert torch.equal(exported.module()(x), eager)
    names = {"weight-only": "gemm_weight_only", "fp8": "gemm_", "int8": "gemm_"}
    for graph in (graphs[0], exported.graph_module):
        calls = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        assert sum(names.get(compute, "gemm_mxfp8") in call for call in calls) == 2


@pytest.mark.parametrize("compute", ["weight-only", "fp8", "int8", "mxfp8-emulated"])
def test_layers_compile_and_export(compute: Compute) -> None:
    assert_traced_equals_eager(compute, "cpu")


def test_an_epilogue_that_the_core_takes_is_one_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice alone, because the kernels need a device."""
    monkeypatch.setattr(linear.FP8Linear, "_core_takes_epilogues", True)
    exported = torch.export.export(TwoLayers("fp8", "cpu"), (random(ROWS, WIDTH),))
    graph = exported.graph_module.graph
    calls = [str(node.target) for node in graph.nodes if "zimage" in str(node.target)]
    names = ["quantize_rows", "gemm_silu_multiply", "gemm_row_scaled"]
    assert calls == [f"zimage_mxfp8.{name}.default" for name in names]


@pytest.mark.gpu
# A library of torch 2.11's compiler for CUDA warns of itself.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("compute", ["weight-only", "fp8", "int8", "mxfp8-emulated"])
def test_layers_compile_and_export_on_cuda(compute: Compute) -> None:
    assert_traced_equals_eager(compute, "cuda")


def test_an_exported_operation_takes_any_number_of_rows() -> None:
    class Encode(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            codes, scales = OPS.quantize(x)
            return codes, scales

    dynamic = {"x": {0: torch.export.Dim("rows", min=2, max=1000)}}
    exported = torch.export.export(Encode(), (random(ROWS, WIDTH),), dynamic_shapes=dynamic)
    x = random(321, WIDTH)
    codes, scales = exported.module()(x)
    want = zm.quantize(x)
    assert torch.equal(codes.view(torch.uint8), want.codes.view(torch.uint8))
    assert torch.equal(scales, want.scales)
