"""The fused kernels on a CUDA device against compositions of torch's operations in float64.

pytest -m gpu
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import zimage_mxfp8 as zm
from helpers.cuda_sync import no_waiting, on_a_device_alone
from zimage_mxfp8 import _core
from zimage_mxfp8.ops import fused
from zimage_mxfp8.transformer import ops

pytestmark = pytest.mark.gpu

COLUMNS = [3840, 10240, 128, 341, 682, 40, 16384]
ROWS = [1, 77, 1500, 4224]  # the last two give a block several rows
ROUNDING = 2.0**-8  # half a unit in the last place of BF16, relative
FORMATS: tuple[fused.ActivationFormat, ...] = ("bfloat16", "row-scaled", "mxfp8")


def random(rows: int, cols: int, seed: int, stride: int = 0) -> torch.Tensor:
    """BF16 with values that differ in size; with a stride, a part of a wider matrix."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    matrix = torch.randn(rows, max(cols, stride), generator=generator, device="cuda")
    exponents = torch.randint(-3, 3, matrix.shape, generator=generator, device="cuda")
    return (matrix * torch.exp2(exponents)).bfloat16()[:, -cols:]


def random_items(rows: int, items: int) -> torch.Tensor:
    generator = torch.Generator(device="cuda").manual_seed(9)
    return torch.randint(0, items, (rows,), generator=generator, device="cuda", dtype=torch.int32)


def rms_norm(x: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    return x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + eps)


def assert_rounded_once(
    result: torch.Tensor, exact: torch.Tensor, terms: torch.Tensor | None = None
) -> None:
    """The exact values to one rounding; float32's errors are relative to the terms of a sum."""
    assert result.dtype == torch.bfloat16 and result.is_cuda
    terms = exact.abs() if terms is None else terms
    allowed = ROUNDING * exact.abs() + 2.0**-16 * terms + 1e-30
    assert ((result.double() - exact).abs() <= allowed).all()


def assert_same_bytes(result: Any, want: Any) -> None:
    assert type(result) is type(want) and tuple(result.shape) == tuple(want.shape)
    for part in ("codes", "scales"):
        first, second = getattr(result, part), getattr(want, part)
        assert first.shape == second.shape and first.dtype == second.dtype
        assert torch.equal(first.view(torch.uint8), second.view(torch.uint8))


def check_formats(call: Callable[[fused.ActivationFormat], Any]) -> torch.Tensor:
    """The BF16 result, after comparing what the other formats hold with what encoding it gives."""
    plain: torch.Tensor = call("bfloat16")
    for output_format, encode in (("row-scaled", zm.quantize_rows), ("mxfp8", zm.quantize)):
        torch.full((1 << 24,), 0xAA, dtype=torch.uint8, device="cuda")  # freed, and taken again
        assert_same_bytes(call(output_format), encode(plain))  # type: ignore[arg-type,operator]
    return plain


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("left", "right"), [(1920, 1920), (1792, 2048), (3840, 8), (341, 341), (8, 33), (8192, 8192)]
)
def test_join_columns(rows: int, left: int, right: int) -> None:
    x, y = random(rows, left, 51, stride=left + 8), random(rows, right, 52, stride=right + 8)
    x[0, left // 2] = torch.inf
    result = check_formats(lambda output_format: fused.join_columns(x, y, output_format))
    assert torch.equal(result, torch.cat((x, y), dim=1))
    if (left + right) % 32 == 0:
        assert_same_bytes(fused.join_columns(x, y, "int8"), fused.quantize_rotated(result))


@pytest.mark.parametrize(("left", "right"), [(1792, 2048), (40, 33)])
@pytest.mark.parametrize(
    "formats",
    [
        {"bfloat16"},
        {"row-scaled"},
        {"mxfp8"},
        {"int8"},
        {"bfloat16", "int8"},
        {"row-scaled", "mxfp8"},
    ],
)
def test_parts_are_encoded_like_one_matrix(
    left: int, right: int, formats: set[fused.ActivationFormat]
) -> None:
    parts = random(77, left, 53), random(77, right, 54)
    found = ops.encode_joined(parts, formats)
    want = ops.encode(torch.cat(parts, dim=1), formats)
    assert found.keys() == want.keys() == formats
    for each, encoded in want.items():
        if each == "bfloat16":
            assert torch.equal(found[each], encoded)
        else:
            assert_same_bytes(found[each], encoded)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("cols", COLUMNS)
@pytest.mark.parametrize("halves", [False, True])
def test_silu_multiply(rows: int, cols: int, halves: bool) -> None:
    if halves:
        gate, up = random(rows, 2 * cols, 1).chunk(2, dim=1)
    else:
        gate, up = random(rows, cols, 1), random(rows, cols, 2)
    result = check_formats(lambda output_format: fused.silu_multiply(gate, up, output_format))
    assert_rounded_once(result, torch.nn.functional.silu(gate.double()) * up.double())


def test_silu_of_every_value() -> None:
    values = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    gate = values.cuda().reshape(256, 256)
    result = fused.silu_multiply(gate, torch.ones_like(gate)).double()
    exact = torch.nn.functional.silu(gate.float()).double()  # NaN at -infinity, as ours
    assert torch.equal(result.isnan(), exact.isnan())
    finite = exact.isfinite()
    error = (result - exact)[finite].abs()
    assert (error <= ROUNDING * exact[finite].abs() + 2e-36).all()
    assert torch.equal(result[exact.isinf()], exact[exact.isinf()])


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("cols", COLUMNS)
@pytest.mark.parametrize("items", [None, 1, 3])
def test_norm_modulate(rows: int, cols: int, items: int | None) -> None:
    x, weight = random(rows, cols, 3), random(1, cols, 4)[0]
    # One of several modulations that one product gave.
    scale = None if items is None else random(items, cols, 5, stride=4 * cols)
    item = random_items(rows, items) if items else None
    result = check_formats(
        lambda output_format: fused.norm_modulate(x, weight, scale, item, output_format)
    )
    exact = rms_norm(x) * weight.double()
    if scale is not None:
        exact = exact * (1 + scale.double()[item])
    assert_rounded_once(result, exact)


def test_one_item_needs_no_items() -> None:
    x, weight, scale = random(77, 3840, 3), random(1, 3840, 4)[0], random(1, 3840, 5)
    item = torch.zeros(77, dtype=torch.int32, device="cuda")
    assert torch.equal(
        fused.norm_modulate(x, weight, scale), fused.norm_modulate(x, weight, scale, item)
    )


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("cols", COLUMNS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("has_addend", [False, True])
def test_add_norm_modulate(
    rows: int, cols: int, gated: bool, scaled: bool, has_addend: bool
) -> None:
    x, y = random(rows, cols, 6), random(rows, cols, 7, stride=cols + 8)
    norm_weight, next_weight = random(1, cols, 8)[0], random(1, cols, 10)[0]
    gate = random(2, cols, 11, stride=4 * cols) if gated else None
    scale = random(2, cols, 12, stride=4 * cols) if scaled else None
    items = random_items(rows, 2)
    addend = random(rows, cols, 13, stride=cols + 8) if has_addend else None
    factor = torch.tensor([-0.7], device="cuda") if has_addend else None

    added = x.clone()
    options = {"items": items, "addend": addend, "addend_factor": factor}
    assert fused.add_norm_modulate(added, y, norm_weight, gate, **options) is None
    update = rms_norm(y) * norm_weight.double()
    if gate is not None:
        update = update * torch.tanh(gate.double())[items]
    terms = [x.double(), update]
    if addend is not None and factor is not None:
        terms.append(addend.double() * factor.double())
    assert_rounded_once(added, sum(terms), sum(map(torch.abs, terms)))

    def call(output_format: fused.ActivationFormat) -> Any:
        copy = x.clone()
        result = fused.add_norm_modulate(
            copy, y, norm_weight, gate, next_weight, scale, output_format=output_format, **options
        )
        assert torch.equal(copy, added)
        return result

    exact = rms_norm(added) * next_weight.double()
    if scale is not None:
        exact = exact * (1 + scale.double()[items])
    result = check_formats(call)
    assert_rounded_once(result, exact)
    assert torch.equal(result, fused.norm_modulate(added, next_weight, scale, items))


def test_gates_of_every_value() -> None:
    gates = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).cuda()
    gates = gates[gates.isfinite()].reshape(-1, 128)
    items = torch.arange(len(gates), dtype=torch.int32, device="cuda")
    ones = torch.ones(len(gates), 128, dtype=torch.bfloat16, device="cuda")
    x = torch.zeros_like(ones)
    fused.add_norm_modulate(x, ones, ones[0], gates, items=items, eps=0.0)
    assert_rounded_once(x, torch.tanh(gates.double()))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("heads", [30, 1, 3, 40])
@pytest.mark.parametrize("gap", [0, 8, 5])
def test_rotate_heads(rows: int, heads: int, gap: int) -> None:
    width = heads * 128
    qkv = random(rows, 3 * width, 13, stride=3 * width + gap)
    weights = random(1, 128, 14)[0], random(1, 128, 15)[0]
    angles = torch.randn(rows, 64, device="cuda") * 3
    rotations = torch.stack([angles.cos(), angles.sin()], -1)
    before = qkv.clone()
    fused.rotate_heads(qkv, *weights, rotations, heads, heads)
    assert torch.equal(qkv[:, 2 * width :], before[:, 2 * width :])
    factors = torch.view_as_complex(rotations.double())[:, None]
    for i, weight in enumerate(weights):
        part = slice(i * width, (i + 1) * width)
        normed = rms_norm(before[:, part].reshape(rows, heads, 128)) * weight.double()
        pairs = torch.view_as_complex(normed.reshape(rows, heads, 64, 2))
        exact = torch.view_as_real(pairs * factors).reshape(rows, width)
        size = pairs.abs()[..., None].expand(-1, -1, -1, 2).reshape(rows, width)
        assert_rounded_once(qkv[:, part], exact, 2 * size)


@pytest.mark.parametrize("heads", [30, 3, 1])
def test_heads_alone_are_those_of_the_whole(heads: int) -> None:
    width, rotations = heads * 128, torch.randn(70, 64, 2, device="cuda")
    qkv = random(70, 3 * width, 30)
    weights = random(1, 128, 31)[0], random(1, 128, 32)[0]
    parts = qkv[:, :width].clone(), qkv[:, width:].clone()
    fused.rotate_heads(qkv, *weights, rotations, heads, heads)
    fused.rotate_heads(parts[0], *weights, rotations, heads, 0)
    fused.rotate_heads(parts[1], *weights, rotations, 0, heads)
    assert torch.equal(torch.cat(parts, dim=1), qkv)


@pytest.mark.parametrize("cols", [3840, 341])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_rows_stay_among_themselves(cols: int, value: float) -> None:
    weight = torch.ones(cols, dtype=torch.bfloat16, device="cuda")
    x, y = random(9, cols, 16), random(9, cols, 17)
    x[2, cols // 2] = value
    y[5, cols - 1] = value
    silu = check_formats(lambda output_format: fused.silu_multiply(x, y, output_format))
    assert (~silu.isfinite()).nonzero().tolist() == [[2, cols // 2], [5, cols - 1]]
    normed = check_formats(
        lambda output_format: fused.norm_modulate(x, weight, output_format=output_format)
    )
    assert normed.isnan().any(1).nonzero().flatten().tolist() == [2]

    def add(output_format: fused.ActivationFormat) -> Any:
        return fused.add_norm_modulate(
            x.clone(), y, weight, None, weight, output_format=output_format
        )

    assert check_formats(add).isnan().any(1).nonzero().flatten().tolist() == [2, 5]


def test_zeros_and_small_rows() -> None:
    weight = random(1, 3840, 18)[0]
    x = random(8, 3840, 19)
    x[1] = 0
    x[3] *= 2.0**-110
    x[4, 100:] = 0
    for eps in (1e-5, 0.0):

        def norm(output_format: fused.ActivationFormat, eps: float = eps) -> Any:
            return fused.norm_modulate(x, weight, output_format=output_format, eps=eps)

        check_formats(norm)
    check_formats(lambda output_format: fused.silu_multiply(x, x, output_format))


def test_items_out_of_range_are_nan() -> None:
    x, weight, scale = random(5, 3840, 20), random(1, 3840, 21)[0], random(2, 3840, 22)
    items = torch.tensor([0, 2, 1, -1, 1 << 30], dtype=torch.int32, device="cuda")
    result = fused.norm_modulate(x, weight, scale, items)
    assert result.isnan().all(1).tolist() == [False, True, False, True, True]
    fused.add_norm_modulate(x, result.nan_to_num(), weight, scale, items=items)
    assert x.isnan().all(1).tolist() == [False, True, False, True, True]
    y, sums = random(5, 3840, 23), [random(5, 3840, 24) for _ in range(2)]
    fused.add_norm_modulate(sums[0], y, weight, items=items)  # nothing that depends on them
    fused.add_norm_modulate(sums[1], y, weight)
    assert torch.equal(*sums)


def test_in_a_graph() -> None:
    x, y, gate_up = random(300, 3840, 23), random(300, 3840, 24), random(300, 640, 25)
    qkv, head, weight = random(300, 1152, 26), random(1, 128, 27)[0], random(1, 3840, 28)[0]
    scale = random(1, 3840, 29)
    rotations = torch.randn(300, 64, 2, device="cuda")

    def work(output_format: fused.ActivationFormat) -> list[Any]:
        result = fused.add_norm_modulate(
            x, y, weight, scale, weight, scale, output_format=output_format
        )
        fused.rotate_heads(qkv, head, head, rotations, 3, 3)
        normed = fused.norm_modulate(x, weight, scale, output_format=output_format)
        return [result, normed, fused.silu_multiply(*gate_up.chunk(2, dim=1), output_format)]

    inputs = [t.clone() for t in (x, qkv)]
    for output_format in FORMATS:
        want = work(output_format)
        written = [t.clone() for t in (x, qkv)]
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        with torch.cuda.graph(graph, stream=stream):
            result = work(output_format)
        for tensor, before in zip((x, qkv), inputs, strict=True):
            tensor.copy_(before)
        graph.replay()
        for tensor, after in zip((x, qkv), written, strict=True):
            assert torch.equal(tensor, after)
            tensor.copy_(inputs[0] if tensor is x else inputs[1])
        for got, expected in zip(result, want, strict=True):
            if output_format == "bfloat16":
                assert torch.equal(got, expected)
            else:
                assert_same_bytes(got, expected)


@on_a_device_alone
def test_neither_waits_nor_allocates() -> None:
    x, weight = random(4096, 3840, 30), random(1, 3840, 31)[0]
    out = torch.empty_like(x)
    fused.norm_modulate(x, weight)
    torch.cuda.synchronize()
    free = torch.cuda.mem_get_info()[0]
    stream = torch.cuda.current_stream().cuda_stream
    with no_waiting():
        torch.cuda._sleep(200_000_000)  # about 0.1 s of work that is in front
        _core.norm_modulate(
            x, weight, None, None, 1e-5, ("bfloat16", out, None, 4096, 3840), stream
        )
        assert not torch.cuda.current_stream().query()  # returned while the device still sleeps
    torch.cuda.synchronize()
    assert torch.cuda.mem_get_info()[0] == free


def test_misuse_is_a_typed_error() -> None:
    x, weight = random(4, 64, 32), random(1, 64, 33)[0]
    flat = torch.zeros(1024, dtype=torch.uint8, device="cuda")
    scales = torch.zeros(4, device="cuda")
    for call, sentence in (
        (lambda: fused.silu_multiply(x, x.cpu()), "gate is on CUDA device 0 but up is on the CPU"),
        (lambda: fused.silu_multiply(x.cpu(), x.cpu()), "not in the memory of a CUDA device"),
        (lambda: fused.norm_modulate(x, weight.cpu()), "but weight is on the CPU"),
        (
            lambda: fused.norm_modulate(x, weight, items=torch.zeros(4, dtype=torch.int32)),
            "but items is on the CPU",
        ),
        (
            lambda: _core.silu_multiply(
                x, x, ("row-scaled", flat[8 : 8 + 256].view(4, 64), scales, 4, 64)
            ),
            "codes must be aligned to 16 bytes",
        ),
        (
            lambda: _core.silu_multiply(
                x, x, ("row-scaled", x.view(torch.uint8)[:2].view(4, 64), scales, 4, 64)
            ),
            "codes overlaps with gate",
        ),
        (lambda: fused.add_norm_modulate(x, x, weight), "x overlaps with y"),
    ):
        with pytest.raises(zm.InvalidArgumentError, match=sentence):
            call()
