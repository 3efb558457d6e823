"""Products with 16-bit weights where the CPU multiplies them itself: right for any number of rows, and of few shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from upcycle.kernels.cpu import products
from upcycle.kernels.cpu.products import Products, padded_rows

EPSILON = torch.finfo(torch.bfloat16).eps


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> Products:
    """Products as they are made on a CPU with such instructions but without tiles, whatever this one has."""
    monkeypatch.setattr(products, "tiled_linear", lambda *_: False)
    monkeypatch.setattr(products, "tiled_outer", lambda *_: False)
    monkeypatch.setattr(products, "fast_natively", lambda dtype: True)
    return Products(torch.bfloat16)


class Shapes(TorchDispatchMode):
    """Collects the shapes of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[Any, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default:
            self.seen.add((tuple(args[0].shape), tuple(args[1].shape)))
        return func(*args, **(kwargs or {}))


def test_padding_is_small_and_leaves_few_shapes() -> None:
    padded = [padded_rows(count) for count in range(1, 4097)]
    assert all(count <= made <= max(count + 7, 9 * count // 8) for count, made in enumerate(padded, 1))
    assert padded[0] == 1  # one token at a time multiplies no zeros
    assert len(set(padded)) <= 70


@pytest.mark.parametrize("add", [False, True])
def test_linear_of_any_number_of_rows(native: Products, add: bool) -> None:
    weight = torch.randn(24, 40).bfloat16()
    for count in range(1, 40):
        rows, out = torch.randn(count, 40), torch.randn(count, 24)
        true = rows.bfloat16().double() @ weight.double().T + (out.double() if add else 0)
        native.linear([rows], [weight.T], [out], add)
        size = rows.bfloat16().double().abs() @ weight.double().abs().T  # each product is rounded once to bf16
        assert ((out - true).abs() <= EPSILON * size).all(), count


def test_outer_of_any_number_of_rows_and_strided_results(native: Products) -> None:
    for count in range(1, 40):
        left, right = torch.randn(count, 24), torch.randn(count, 40)
        outs = [torch.empty(24, 40, dtype=torch.bfloat16), torch.empty(40, 24, dtype=torch.bfloat16).T]
        for out in outs:
            native.outer([left], [right], [out])
        true = left.bfloat16().double().T @ right.bfloat16().double()
        size = left.bfloat16().double().abs().T @ right.bfloat16().double().abs()
        assert all(((out - true).abs() <= EPSILON * size).all() for out in outs), count


def test_experts_of_other_loads_multiply_in_few_shapes(native: Products) -> None:
    weight, outer = torch.randn(8, 16).bfloat16(), torch.empty(8, 16, dtype=torch.bfloat16)
    with Shapes() as shapes:
        for count in range(1, 400):
            rows, made = torch.randn(count, 16), torch.empty(count, 8)
            native.linear([rows], [weight.T], [made])
            native.outer([made], [rows], [outer])
    assert len(shapes.seen) <= 2 * len({padded_rows(count) for count in range(1, 400)}) <= 84
