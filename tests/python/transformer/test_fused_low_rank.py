"""The operands of the branch that a layer's GEMM adds, multiplied by torch in float64."""

from __future__ import annotations

import torch

import zimage_mxfp8 as zm
from zimage_mxfp8.ops.gemm import RowScaledArray
from zimage_mxfp8.transformer.fused_low_rank import (
    FP8LowRankAdapter,
    WeightOnlyLowRankAdapter,
    can_fuse,
    two_terms,
)
from zimage_mxfp8.transformer.low_rank import Addend, WeightTable

N, K = 96, 64


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(seed: int = 0) -> RowScaledArray:
    sizes = torch.exp2(torch.randint(-12, 4, (N, 1), generator=torch.Generator().manual_seed(1)))
    folded, _ = zm.fold(zm.quantize(random(N, K, seed=seed) * sizes))
    return folded


def addends() -> list[Addend]:
    return [
        Addend("a", "one", slice(0, 32), random(4, K, seed=2) * 1e-6, random(32, 4, seed=3)),
        Addend("a", "two", slice(32, 96), random(8, 60, seed=4), random(64, 8, seed=5) * 1e-3),
        Addend("b", "one", slice(0, 32), random(30, K, seed=6) * 1e5, random(32, 30, seed=7)),
    ]


def decoded_terms(terms: RowScaledArray) -> torch.Tensor:
    rows = terms.codes.view(torch.float8_e4m3fn).double() * terms.scales.double()[:, None]
    return rows[0::2] + rows[1::2]


def test_two_terms_are_as_exact_as_bfloat16() -> None:
    sizes = torch.exp2(torch.arange(-60.0, 60.0, 10)[:, None])
    matrix = random(12, 4096, seed=9) * sizes
    matrix[3] = 0
    error = decoded_terms(two_terms(matrix)) - matrix.double()
    largest = matrix.abs().amax(1, keepdim=True).double()
    assert (error.abs() <= 2.0**-8 * matrix.double().abs() + 2.0**-22 * largest).all()
    assert error.norm() < (matrix.bfloat16().double() - matrix.double()).norm() * 1.5


def test_operands_stand_for_the_dense_delta() -> None:
    layer = weights()
    adapter = FP8LowRankAdapter([*addends()], layer)
    assert adapter.rank == 64  # 42, to a multiple of 32
    WeightTable([adapter]).set(lambda name, layer: {"a": 0.7, "b": -0.01}[name] if layer else None)
    x = zm.quantize_rows(random(10, K, seed=8))
    codes = x.codes.view(torch.float8_e4m3fn).double()
    narrow = codes @ decoded_terms(adapter.down).T * adapter.scales
    found = narrow @ adapter.up.double().T * x.scales.double()[:, None] * layer.scales.double()
    want = torch.zeros(10, N, dtype=torch.float64)
    decoded = codes * x.scales.double()[:, None]
    for addend, weight in zip(addends(), (0.7, 0.7, -0.01), strict=True):
        assert addend.down is not None and addend.up is not None
        padded = torch.nn.functional.pad(addend.down, (0, K - addend.down.shape[1]))
        want[:, addend.rows] += weight * decoded @ padded.double().T @ addend.up.double().T
    assert torch.allclose(found, want, rtol=0, atol=5e-3 * want.abs().max().item())
    for rows in (slice(0, 32), slice(32, 96)):
        difference = (found - want)[:, rows].norm() / want[:, rows].norm()
        assert difference < 4e-3  # of `up` in bfloat16


def test_weights_change_in_place() -> None:
    adapters = [FP8LowRankAdapter(addends(), weights()) for _ in range(2)]
    table = WeightTable(adapters)
    scales = [adapter.scales for adapter in adapters]  # a graph reads them
    table.set(lambda name, _: 1.0 if name == "a" else None)
    for adapter, kept in zip(adapters, scales, strict=True):
        assert adapter.scales is kept
        assert torch.equal(kept[:12], adapter.powers[:12]) and not kept[12:].any()
        assert adapter.weights.tolist() == adapter.active.tolist() == [1.0, 1.0, 0.0]


def test_the_operands_of_a_weight_only_layer() -> None:
    layer = zm.quantize(random(N, K, seed=9))
    adapter = WeightOnlyLowRankAdapter(addends(), layer)
    WeightTable([adapter]).set(lambda *_: 0.5)
    x = random(10, K, seed=8).bfloat16()
    narrow = x[:, :60].double() @ adapter.down[:, :60].double().T * adapter.scales
    found = narrow @ adapter.up.double().T
    want = torch.zeros(10, N, dtype=torch.float64)
    for each in addends():
        assert each.down is not None and each.up is not None
        down = torch.nn.functional.pad(each.down, (0, K - each.down.shape[1]))[:, :60]
        want[:, each.rows] += 0.5 * x[:, :60].double() @ down.double().T @ each.up.double().T
    for rows in (slice(0, 32), slice(32, 96)):
        assert (found - want)[:, rows].norm() / want[:, rows].norm() < 8e-3


def test_what_is_not_low_rank_alone_is_not_fused() -> None:
    plain = addends()
    assert can_fuse(plain)
    bias = Addend("c", "one", slice(0, N), None, None, torch.zeros(N))
    dense = Addend("c", "one", slice(0, N), None, torch.zeros(N, K))
    norms = Addend("c", "one", slice(0, 32), plain[0].down, plain[0].up, None, torch.ones(4, 32))
    for other in (bias, dense, norms):
        assert not can_fuse([*plain, other])


def test_an_overflow_is_noticed() -> None:
    zeros = torch.zeros(N, K)
    folded, _ = zm.fold(zm.quantize(zeros))
    tiny = RowScaledArray(folded.codes, torch.full_like(folded.scales, 2.0**-126))
    huge = [Addend("a", "one", slice(0, N), torch.ones(1, K), torch.full((N, 1), 1e5))]
    assert not FP8LowRankAdapter(huge, tiny).is_finite
    assert FP8LowRankAdapter(addends(), weights()).is_finite
