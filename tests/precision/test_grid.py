"""Rounding to few bits, against formulas in fp64, and packing, against the package that reads it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

from upcycle.files.formats.packed_bits import pack_rows, unpack_rows
from upcycle.precision.gptq import DAMPING, LEAST_TOKENS, best_rounding, damping, gptq, output_error
from upcycle.precision.grid import NumberGrid, scales_of, to_nearest

DRAW = torch.Generator().manual_seed(3)


def weight(rows: int = 12, columns: int = 32) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


def hessian(columns: int = 32, tokens: int = 200) -> torch.Tensor:
    """Second moments of inputs that depend on each other, as those of a layer do."""
    draw = torch.Generator().manual_seed(2)
    mixing = torch.randn(columns, columns, generator=draw) * torch.rand(columns, generator=draw) ** 3
    inputs = torch.randn(tokens, columns, generator=draw) @ mixing
    return (inputs.T @ inputs).double()


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_is_that_of_compressed_tensors(bits: int) -> None:
    for columns in (1, 16, 31, 32, 33, 100):
        values = torch.randint(-(1 << bits - 1), 1 << bits - 1, (5, columns), generator=DRAW, dtype=torch.int8)
        packed = pack_rows(values, bits)
        assert torch.equal(packed, pack_to_int32(values, bits))
        assert torch.equal(unpack_rows(packed, bits, columns), values)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("group", [0, 16])
def test_nearest_rounding_takes_the_nearest_number_of_every_group(bits: int, group: int) -> None:
    made = to_nearest(weight(), NumberGrid(bits, group, "float32"))
    groups = 32 // (group or 32)
    assert made.scales.shape == (12, groups)
    grid = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    for row, scales, values, means in zip(weight(), made.scales, made.values, made.means, strict=True):
        for part in range(groups):
            columns = slice(part * 32 // groups, (part + 1) * 32 // groups)
            allowed = grid * float(scales[part])
            errors = np.abs(row[columns].double().numpy()[:, None] - allowed[None])
            best, own = errors.min(1), np.abs((row - means)[columns].double().numpy())
            np.testing.assert_allclose(own, best, rtol=1e-5, atol=1e-6)
            assert values[columns].min() >= grid[0] and values[columns].max() <= grid[-1]


def test_scales_of_few_bits_are_searched_for() -> None:
    """No scale of a fine list leaves much less than the one that was found, and the largest number alone would choose a worse one."""
    row = torch.cat([torch.linspace(-1, 1, 31), torch.tensor([4.0])])[None]
    found = (to_nearest(row, NumberGrid(3, 0, "float32")).means - row).square().sum().item()
    tried = []
    for scale in torch.linspace(-4, 4, 2001):
        if scale != 0:
            tried.append(((row / scale).round().clamp(-4, 3) * scale - row).square().sum().item())
    plain = ((row / (4 / 3)).round().clamp(-4, 3) * (4 / 3) - row).square().sum().item()
    assert found < 1.1 * min(tried)
    assert found < 0.7 * plain


def test_fp8_scales_make_the_largest_number_of_a_row_the_largest_of_fp8() -> None:
    made = to_nearest(weight(), NumberGrid(0, 0, "float32"))
    assert made.values.dtype == torch.float8_e4m3fn
    torch.testing.assert_close(made.scales[:, 0] * 448, weight().abs().amax(1))
    assert ((made.means - weight()).abs() <= weight().abs() / 16 + made.scales / 512).all()  # 3 bits of mantissa


def restated(w: np.ndarray, h: np.ndarray, scales: np.ndarray, bits: int, group: int, damped: float) -> np.ndarray:
    """GPTQ's update (arXiv 2210.17323, equations 2 and 3), without its Cholesky form: after each column, the inverse is reduced."""
    columns = len(h)
    order = np.argsort(-np.diag(h), kind="stable")
    h = h + damped * np.diag(h).mean() * np.eye(columns)
    inverse, left, out = np.linalg.inv(h), w.copy(), np.zeros_like(w)
    gone = np.zeros(columns, dtype=bool)
    for i in order:
        scale = scales[:, i // group]
        out[:, i] = np.clip(np.round(left[:, i] / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale
        error = (left[:, i] - out[:, i]) / inverse[i, i]
        left = left - np.outer(error, inverse[i])
        gone[i] = True
        inverse = inverse - np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        inverse[gone] = inverse[:, gone] = 0
    return out


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_is_the_update_of_its_paper_in_fp64(bits: int) -> None:
    grid, seen = NumberGrid(bits, 16, "float32", wide=True), hessian()
    scales = scales_of(weight(), grid, seen.diagonal().float())
    expected = restated(weight().double().numpy(), seen.numpy(), scales.double().numpy(), bits, 16, 0.01)
    np.testing.assert_allclose(gptq(weight(), seen, grid, 0.01).means.numpy(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_changes_outputs_less_than_nearest_rounding(bits: int) -> None:
    grid, seen = NumberGrid(bits, 16, "bfloat16"), hessian()
    made, plain = gptq(weight(), seen, grid, 0.01), to_nearest(weight(), grid)
    assert output_error(weight(), made.means, seen) < 0.8 * output_error(weight(), plain.means, seen)
    inputs = torch.linalg.cholesky(seen + 1e-9 * torch.eye(32)).T
    direct = (inputs @ (weight() - made.means).double().T).square().sum().item()
    assert output_error(weight(), made.means, seen) == pytest.approx(direct, rel=1e-6)


def test_held_out_tokens_judge_and_few_tokens_are_not_believed() -> None:
    grid = NumberGrid(3, 16, "bfloat16")
    plain = to_nearest(weight(), grid)
    made, better = best_rounding(weight(), hessian(), hessian(), 200, grid)
    assert better
    assert not torch.equal(made.means, plain.means)
    other = torch.diag(torch.rand(32, generator=DRAW).double() ** 8)  # what GPTQ fitted does not occur
    made, better = best_rounding(weight(), hessian(), other, 200, grid)
    judged = output_error(weight(), made.means, other)
    assert judged <= output_error(weight(), plain.means, other)
    made, better = best_rounding(weight(), hessian(), None, LEAST_TOKENS - 1, grid)
    assert not better
    assert torch.equal(made.means, plain.means)


def test_damping_grows_where_tokens_are_few_and_a_singular_hessian_is_nearest_rounding() -> None:
    assert damping(10**9, 32) == pytest.approx(DAMPING)
    assert damping(32, 320) == pytest.approx(11 * DAMPING)
    grid = NumberGrid(4, 16, "bfloat16")
    assert torch.equal(gptq(weight(), torch.zeros(32, 32).double(), grid, 0.01).means, to_nearest(weight(), grid).means)
