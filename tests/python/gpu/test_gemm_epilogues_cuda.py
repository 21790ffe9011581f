"""Products with fused epilogues on a Hopper GPU, against torch in float64 on decoded operands.

pytest -m gpu
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import zimage_mxfp8 as zm
from zimage_mxfp8 import _core
from zimage_mxfp8.ops import fused
from zimage_mxfp8.ops.gemm_epilogues import gemm_rotate_heads, gemm_silu_multiply

pytestmark = pytest.mark.gpu

# Sums are the tensor cores' own, of 14 bits or so, over all of K.
SUMS = 2.0**-9
ROUNDING = 2.0**-9  # half a unit in the last place of BF16: of the product, and of the result
TOKENS = [1, 63, 64, 129, 300, 4224]
# On 132 multiprocessors the last 64 are half a tile, see test_fused_order.cpp: of 20,480 rows with
# 576 tokens, of 11,520 and 3,840 rows with 1,088.
TOKENS += [576, 1088]


@pytest.fixture(autouse=True)
def _hopper() -> None:
    problem = _core.GemmProblem(
        128, 384, 128, "row-scaled", "row-scaled", "bfloat16", False, "rotate_heads"
    )
    if why := _core.gemm_unsupported("fp8_sm90", problem, torch.cuda.current_device()):
        pytest.skip(why)


def fused_silu_multiply(a: zm.RowScaledArray, b: zm.RowScaledArray) -> torch.Tensor:
    result: torch.Tensor = gemm_silu_multiply(a, b, kernel="fp8_sm90")
    return result


def fused_rotate_heads(*arguments: Any, out: torch.Tensor | None = None) -> torch.Tensor:
    result: torch.Tensor = gemm_rotate_heads(*arguments, kernel="fp8_sm90", out=out)
    return result


def operand(rows: int, depth: int, seed: int) -> zm.RowScaledArray:
    """Rows that differ in size by a factor of 64."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    matrix = torch.randn(rows, depth, generator=generator, device="cuda")
    size = torch.randint(-3, 3, (rows, 1), generator=generator, device="cuda")
    return zm.quantize_rows(matrix * torch.exp2(size) / depth**0.5)


def decoded(array: zm.RowScaledArray) -> torch.Tensor:
    values: torch.Tensor = array.codes.double() * array.scales[:, None].double()
    return values


def product(a: zm.RowScaledArray, b: zm.RowScaledArray) -> torch.Tensor:
    return decoded(a) @ decoded(b).T


def bounds(a: zm.RowScaledArray, b: zm.RowScaledArray) -> torch.Tensor:
    """What the error of a sum is relative to."""
    return decoded(a).square().sum(1).sqrt()[:, None] * decoded(b).square().sum(1).sqrt()


@pytest.mark.parametrize("rows", TOKENS)
@pytest.mark.parametrize(
    ("columns", "depth"), [(10240, 3840), (10240, 32), (8, 32), (72, 160), (200, 128)]
)
def test_silu_multiply(rows: int, columns: int, depth: int) -> None:
    a, b = operand(rows, depth, 1), operand(2 * columns, depth, 2)
    result = fused_silu_multiply(a, b)
    gate, up = product(a, b).chunk(2, dim=1)
    exact = torch.nn.functional.silu(gate) * up
    assert result.dtype == torch.bfloat16 and result.shape == exact.shape
    of_gate, of_up = (bounds(a, b) * SUMS + product(a, b).abs() * 2 * ROUNDING).chunk(2, dim=1)
    # silu's slope is at most 1.1.
    allowed = 1.1 * of_gate * up.abs() + of_up * gate.abs() + 1.1 * of_gate * of_up
    assert ((result.double() - exact).abs() <= allowed + 2 * ROUNDING * exact.abs()).all()
    assert ((result.double() - exact).norm() / exact.norm()).item() < 5e-3


def rotated(values: torch.Tensor, q: Any, k: Any, rotations: Any, heads: int) -> torch.Tensor:
    parts = values.unflatten(1, (3, heads, 128))
    results = []
    for part, weight in ((parts[:, 0], q), (parts[:, 1], k)):
        normed = part * torch.rsqrt(part.square().mean(-1, keepdim=True) + 1e-5) * weight.double()
        pairs = torch.view_as_complex(normed.unflatten(-1, (64, 2)).contiguous())
        turn = torch.view_as_complex(rotations.double())[:, None]
        results.append(torch.view_as_real(pairs * turn).flatten(-2))
    return torch.stack([*results, parts[:, 2]], dim=1).flatten(1)


@pytest.mark.parametrize("rows", TOKENS)
@pytest.mark.parametrize(("heads", "depth"), [(30, 3840), (30, 32), (1, 128), (3, 416)])
def test_rotate_heads(rows: int, heads: int, depth: int) -> None:
    a, b = operand(rows, depth, 3), operand(3 * heads * 128, depth, 4)
    generator = torch.Generator(device="cuda").manual_seed(5)
    angles = torch.rand(rows, 64, generator=generator, device="cuda") * 6.3
    rotations = torch.stack((angles.cos(), angles.sin()), dim=-1)
    q, k = (
        (torch.rand(128, generator=generator, device="cuda") + 0.5).bfloat16() for _ in range(2)
    )
    result = fused_rotate_heads(a, b, q, k, rotations, heads, heads)
    exact = rotated(product(a, b), q, k, rotations, heads)
    assert result.dtype == torch.bfloat16 and result.shape == exact.shape
    for i in range(3):  # q, k and v
        part, want = (
            x.double().chunk(3, dim=1)[i].unflatten(1, (heads, 128)) for x in (result, exact)
        )
        error = (part - want).norm(dim=-1) / want.norm(dim=-1)
        assert error.max().item() < 1e-2 and error.mean().item() < 5e-3


@pytest.mark.parametrize("rows", TOKENS)
@pytest.mark.parametrize("heads", [30, 3, 1])
def test_heads_alone_are_those_of_the_whole(rows: int, heads: int) -> None:
    a, b = operand(rows, 416, 30), operand(3 * heads * 128, 416, 31)
    generator = torch.Generator(device="cuda").manual_seed(32)
    angles = torch.rand(rows, 64, generator=generator, device="cuda") * 6.3
    rotations = torch.stack((angles.cos(), angles.sin()), dim=-1)
    q, k = (torch.rand(128, generator=generator, device="cuda").bfloat16() for _ in range(2))
    whole = fused_rotate_heads(a, b, q, k, rotations, heads, heads)
    width = heads * 128
    for part, q_heads, k_heads in (
        (slice(width), heads, 0),
        (slice(width, 2 * width), 0, heads),
        (slice(width, 3 * width), 0, heads),
        (slice(2 * width, 3 * width), 0, 0),
    ):
        of_part = zm.RowScaledArray(b.codes[part], b.scales[part])
        found = fused_rotate_heads(a, of_part, q, k, rotations, q_heads, k_heads)
        assert torch.equal(found, whole[:, part])
        memory = torch.full_like(whole, torch.nan)
        out = memory[:, part]
        found = fused_rotate_heads(a, of_part, q, k, rotations, q_heads, k_heads, out=out)
        assert found.data_ptr() == out.data_ptr() and torch.equal(out, whole[:, part])
        assert memory.isnan().sum() == memory.numel() - out.numel()


def heads_of(a: zm.RowScaledArray, b: zm.RowScaledArray, rotations: torch.Tensor) -> torch.Tensor:
    weight = torch.ones(128, dtype=torch.bfloat16, device="cuda")
    heads = b.shape[0] // 384
    return fused_rotate_heads(a, b, weight, weight, rotations, heads, heads)


def test_same_bytes_again() -> None:
    a, b = operand(4224, 3840, 6), operand(20480, 3840, 7)
    assert torch.equal(fused_silu_multiply(a, b), fused_silu_multiply(a, b))
    qkv = zm.RowScaledArray(b.codes[:11520], b.scales[:11520])
    rotations = torch.rand(4224, 64, 2, device="cuda")
    assert torch.equal(heads_of(a, qkv, rotations), heads_of(a, qkv, rotations))


def test_in_a_graph() -> None:
    a, b = operand(300, 256, 21), operand(768, 256, 22)
    rotations = torch.rand(300, 64, 2, device="cuda")
    want = fused_silu_multiply(a, b), heads_of(a, b, rotations)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = fused_silu_multiply(a, b), heads_of(a, b, rotations)
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(results, want, strict=True))


def test_memory_at_any_offset() -> None:
    a, b = operand(70, 128, 23), operand(768, 128, 24)
    rotations = torch.rand(70, 64, 2, device="cuda")
    want = heads_of(a, b, rotations)

    def shifted(tensor: torch.Tensor) -> torch.Tensor:
        room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device="cuda")[1:]
        return room.view(tensor.shape).copy_(tensor)

    a, b = (zm.RowScaledArray(shifted(x.codes), shifted(x.scales)) for x in (a, b))
    assert torch.equal(heads_of(a, b, shifted(rotations)), want)


def test_the_kernel_of_least_cost_is_taken() -> None:
    """Few tokens do not fill the device with the large tiles of the fused kernel."""
    for tokens, kernel in ((4224, "fp8_sm90"), (1, "fp8_rowwise")):
        a, b = operand(tokens, 3840, 25), operand(20480, 3840, 26)
        found = gemm_silu_multiply(a, b)
        assert torch.equal(found, gemm_silu_multiply(a, b, kernel=kernel))
        other = "fp8_rowwise" if kernel == "fp8_sm90" else "fp8_sm90"
        assert not torch.equal(found, gemm_silu_multiply(a, b, kernel=other))


@pytest.mark.parametrize("tokens", [1, 130])
def test_a_separate_epilogue_has_the_bytes_of_two_calls(tokens: int) -> None:
    a, b = operand(tokens, 256, 27), operand(768, 256, 28)
    gate, up = zm.gemm(a, b, kernel="fp8_rowwise").chunk(2, dim=1)
    for form in ("bfloat16", "row-scaled", "mxfp8"):
        found = gemm_silu_multiply(a, b, form, kernel="fp8_rowwise")  # type: ignore[arg-type]
        want = fused.silu_multiply(gate, up, form)  # type: ignore[arg-type]
        assert_same(found, want)
    weight = torch.rand(128, device="cuda").bfloat16()
    rotations = torch.rand(tokens, 64, 2, device="cuda")
    qkv = zm.gemm(a, b, kernel="fp8_rowwise")
    fused.rotate_heads(qkv, weight, weight, rotations, 2, 2)
    found = gemm_rotate_heads(a, b, weight, weight, rotations, 2, 2, kernel="fp8_rowwise")
    assert torch.equal(found, qkv)


def test_weights_in_mxfp8_take_a_separate_epilogue() -> None:
    x = torch.randn(130, 256, device="cuda").bfloat16()
    weights = zm.quantize(torch.randn(768, 256, device="cuda"))
    gate, up = zm.gemm(x, weights).chunk(2, dim=1)
    assert torch.equal(gemm_silu_multiply(x, weights), fused.silu_multiply(gate, up))


def assert_same(found: Any, want: Any) -> None:
    if isinstance(want, torch.Tensor):
        assert torch.equal(found, want)
        return
    assert torch.equal(found.codes.view(torch.uint8), want.codes.view(torch.uint8))
    assert torch.equal(found.scales, want.scales)


@pytest.mark.parametrize("form", ["row-scaled", "mxfp8"])
def test_a_fused_result_is_encoded(form: Any) -> None:
    a, b = operand(300, 256, 29), operand(2048, 256, 30)
    plain = fused_silu_multiply(a, b)
    want = zm.quantize_rows(plain) if form == "row-scaled" else zm.quantize(plain)
    assert_same(gemm_silu_multiply(a, b, form, kernel="fp8_sm90"), want)


def test_rows_do_not_depend_on_other_rows() -> None:
    a, b = operand(300, 3840, 8), operand(2048, 3840, 9)
    some = zm.RowScaledArray(a.codes[130:200], a.scales[130:200])
    assert torch.equal(fused_silu_multiply(some, b), fused_silu_multiply(a, b)[130:200])


def test_nan_stays_in_its_row() -> None:
    a, b = operand(200, 256, 10), operand(3 * 128, 256, 11)
    a.scales[70] = torch.nan
    weight = torch.ones(128, dtype=torch.bfloat16, device="cuda")
    rotations = torch.tensor([1.0, 0.0], device="cuda").expand(200, 64, 2).contiguous()
    result = fused_rotate_heads(a, b, weight, weight, rotations, 1, 1)
    silu = fused_silu_multiply(a, b)
    for matrix in (result, silu):
        is_nan = matrix.isnan()
        assert is_nan[70].all() and not is_nan[:70].any() and not is_nan[71:].any()


def test_nothing_to_do() -> None:
    a, b = operand(4, 128, 12), operand(384, 128, 13)
    none = zm.RowScaledArray(a.codes[:0], a.scales[:0])
    assert fused_silu_multiply(none, b).shape == (0, 192)
    assert heads_of(none, b, torch.zeros(0, 64, 2, device="cuda")).shape == (0, 384)


def test_bad_arguments() -> None:
    a, b = operand(4, 128, 14), operand(384, 128, 15)
    weight = torch.ones(128, dtype=torch.bfloat16, device="cuda")
    rotations = torch.zeros(4, 64, 2, device="cuda")

    def rotate(**changed: Any) -> None:
        arguments = {"a": a, "b": b, "q_weight": weight, "k_weight": weight}
        gemm_rotate_heads(
            **{**arguments, "rotations": rotations, "q_heads": 1, "k_heads": 1, **changed}  # type: ignore[arg-type]
        )

    for changed, sentence in (
        ({"q_heads": 3}, "B's rows are 384, which cannot begin with 3 heads of q and 1 of k"),
        ({"k_heads": -1}, "k_heads must be 0 to 1048575"),
        ({"a": a.codes}, "a must be an MXFP8Array, a RowScaledArray, an Int8Array or"),
        ({"b": operand(384, 64, 16)}, "a is .4, 128. and b is .384, 64.: their widths differ"),
        ({"rotations": rotations[:3]}, "rotations must be float32 .4, 64, 2., not"),
        ({"q_weight": weight[:64]}, "q_weight must be .128."),
        ({"eps": -1.0}, "eps must be 0 or more"),
    ):
        with pytest.raises(zm.InvalidArgumentError, match=sentence):
            rotate(**changed)
    with pytest.raises(zm.InvalidArgumentError, match="K must be a multiple of 32"):
        fused_silu_multiply(operand(4, 40, 17), operand(16, 40, 18))
    for rows in (376, 382):
        with pytest.raises(zm.InvalidArgumentError, match="N must be a multiple of"):
            fused_silu_multiply(a, operand(rows, 128, 19))
    host = zm.RowScaledArray(a.codes.cpu(), a.scales.cpu())
    with pytest.raises(zm.InvalidArgumentError, match="a must be on a CUDA device"):
        fused_silu_multiply(host, b)
