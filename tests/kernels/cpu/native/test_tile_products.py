"""Products in the processor's tiles: exact to the rounding of sums, for any number of rows, any sizes and any strides."""

from __future__ import annotations

import pytest
import torch

from upcycle.kernels.cpu.native.tile_products import LARGEST_TILED, tile_products, tiled_linear, tiled_outer
from upcycle.kernels.cpu.products import Products
from upcycle.kernels.layout.token_rows import TokenRows

pytestmark = pytest.mark.skipif(tile_products() is None, reason="this CPU has no tiles, or there is no compiler")
FP32, BF16 = torch.finfo(torch.float32).eps, torch.finfo(torch.bfloat16).eps
COUNTS = (0, 1, 2, 15, 16, 17, 33, 300)
SIZES = [(1, 1), (8, 40), (31, 33), (64, 96), (130, 7)]


def rows_of(width: int, seed: int, room: int = 0) -> list[torch.Tensor]:
    """Parts of one fp32 matrix, whose rows may lie apart."""
    rng = torch.Generator().manual_seed(seed)
    return list(torch.randn(sum(COUNTS), width + room, generator=rng)[:, :width].split(COUNTS))


def check(found: torch.Tensor, left: torch.Tensor, right: torch.Tensor, also: float = 0.0) -> None:
    """``left @ right`` of numbers rounded to bf16, summed in fp32 in any order, and then rounded by a part ``also``."""
    a, b = left.bfloat16().double(), right.bfloat16().double()
    bound = (a.shape[1] * FP32 + also) * (a.abs() @ b.abs())
    assert ((found.double() - a @ b).abs() <= bound).all()


@pytest.mark.parametrize(("i", "j"), SIZES)
@pytest.mark.parametrize("turned", [False, True])
def test_linear(i: int, j: int, turned: bool) -> None:
    rng = torch.Generator().manual_seed(1)
    stored = torch.randn(len(COUNTS), *((i, j) if turned else (j, i)), generator=rng).bfloat16()
    weights = list((stored.transpose(1, 2) if turned else stored).unbind(0))
    rows, outs = rows_of(j, 2, room=3), rows_of(i, 3, room=5)
    before = [out.clone() for out in outs]
    assert tiled_linear(rows, weights, outs, add=False)
    for row, weight, out in zip(rows, weights, outs, strict=True):
        check(out, row, weight)
    written = [out.clone() for out in outs]
    for out, old in zip(outs, before, strict=True):
        out.copy_(old)
    assert tiled_linear(rows, weights, outs, add=True)
    for out, old, new in zip(outs, before, written, strict=True):
        assert torch.equal(out, new + old)


def test_nothing_is_written_beside_a_result() -> None:
    rows, whole = torch.randn(17, 40), torch.full((19, 40), 7.0)
    weight = torch.randn(40, 33).bfloat16()
    assert tiled_linear([rows], [weight], [whole[1:18, 2:35]], add=False)
    inside = torch.zeros_like(whole, dtype=torch.bool)
    inside[1:18, 2:35] = True
    assert (whole[~inside] == 7).all()
    assert not (whole[inside] == 7).any()


@pytest.mark.parametrize(("i", "j"), SIZES)
@pytest.mark.parametrize("turned", [False, True])
def test_outer(i: int, j: int, turned: bool) -> None:
    lefts, rights = rows_of(i, 4, room=1), rows_of(j, 5, room=2)
    made = torch.full((len(COUNTS), *((j, i) if turned else (i, j))), 7.0, dtype=torch.bfloat16)
    outs = list((made.transpose(1, 2) if turned else made).unbind(0))
    assert tiled_outer(lefts, rights, outs)
    for left, right, out in zip(lefts, rights, outs, strict=True):
        check(out, left.T, right, also=BF16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_read_where_they_lie(dtype: torch.dtype) -> None:
    """By their numbers, which may come again: the same bits as from a copy of them."""
    rng = torch.Generator().manual_seed(6)
    tokens = torch.randn(50, 40, generator=rng).to(dtype)
    index = torch.randint(50, (sum(COUNTS),), generator=rng, dtype=torch.int32)
    copied = tokens[index.long()].float()
    lying = TokenRows(tokens, index, COUNTS, lambda: copied)
    weights = list(torch.randn(len(COUNTS), 40, 24, generator=rng).bfloat16().unbind(0))
    one, two = rows_of(24, 7), rows_of(24, 7)
    assert tiled_linear(lying, weights, one, add=True)
    assert tiled_linear(copied.split(COUNTS), weights, two, add=True)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    for first in (True, False):
        outs = [list(torch.empty(len(COUNTS), 40 if first else 24, 24 if first else 40).bfloat16()) for _ in range(2)]
        for out, rows in zip(outs, (lying, copied.split(COUNTS)), strict=True):
            assert tiled_outer(*((rows, one) if first else (one, rows)), out)
        assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))
    assert "together" not in vars(lying), "nothing was gathered"


def test_numbers_that_are_not_finite_stay_so() -> None:
    rows, weight = torch.ones(3, 40), torch.ones(40, 20).bfloat16()
    rows[0, 3], rows[1, 4] = torch.nan, torch.inf
    out = torch.empty(3, 20)
    assert tiled_linear([rows], [weight], [out], add=False)
    assert out[0].isnan().all()
    assert (out[1] == torch.inf).all()
    assert (out[2] == 40).all()


def test_what_it_does_not_take() -> None:
    """Other dtypes, matrices for which oneDNN is as fast, and strides that it does not read."""
    rows, out = torch.randn(4, 8), torch.empty(4, 6)
    weight = torch.randn(8, 6).bfloat16()
    assert not tiled_linear([rows], [weight.half()], [out], add=False)
    assert not tiled_linear([rows.double()], [weight], [out], add=False)
    assert not tiled_linear([rows.T.contiguous().T], [weight], [out], add=False)
    assert not tiled_linear([rows], [torch.randn(8, 12).bfloat16()[:, ::2].T[::1].T], [out], add=False)
    wide = torch.empty(8, LARGEST_TILED // 8 + 1, dtype=torch.bfloat16)
    assert not tiled_linear([rows], [wide], [torch.empty(4, LARGEST_TILED // 8 + 1)], add=False)
    assert not tiled_outer([rows], [rows.double()], [torch.empty(8, 8, dtype=torch.bfloat16)])


def test_experts_run_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of 16-bit weights do not ask torch for a single one."""
    monkeypatch.setattr(Products, "_padded", None)
    products = Products(torch.bfloat16)
    rows, weights = rows_of(40, 1), list(torch.randn(len(COUNTS), 40, 24).bfloat16())
    outs, made = rows_of(24, 2), list(torch.empty(len(COUNTS), 40, 24).bfloat16())
    products.linear(rows, weights, outs)
    products.outer(rows, outs, made)
    check(outs[-1], rows[-1], weights[-1])
    check(made[-1], rows[-1].T, outs[-1], also=BF16)
