"""Rounding to three numbers per row, restated by loops in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from upcycle.ffn.rounding.ternary import nearest_ternary, ternary_of_least_error

R, C = 5, 12


def drawn(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(40, C, generator=draw).double() @ torch.randn(C, C, generator=draw).double()
    return torch.randn(R, C, generator=draw), inputs.T @ inputs


def nearest(value: float, row: np.ndarray) -> float:
    numbers = [0.0, min(float(row.min()), 0.0), max(float(row.max()), 0.0)]
    return min(numbers, key=lambda number: abs(value - number))


@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0])
def test_every_number_becomes_the_nearest_of_its_row(shift: float) -> None:
    matrix = drawn()[0] + shift
    expected = [[nearest(float(value), row.numpy()) for value in row] for row in matrix]
    assert torch.equal(nearest_ternary(matrix), torch.tensor(expected))
    assert torch.equal(nearest_ternary(matrix[None])[0], nearest_ternary(matrix))


def slowly(matrix: np.ndarray, gram: np.ndarray, damping: float) -> np.ndarray:
    """Optimal Brain Quantization in a fixed order: after each column, the inverse without it (Frantar et al., eq. 2 and 3)."""
    hessian = gram + damping * np.diagonal(gram).mean() * np.eye(C)
    inverse, left, made = np.linalg.inv(hessian), matrix.copy(), np.zeros_like(matrix)
    for column in range(C):
        for row in range(R):
            made[row, column] = nearest(left[row, column], matrix[row])
        error = (left[:, column] - made[:, column]) / inverse[column, column]
        left -= np.outer(error, inverse[column])
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return made


def test_errors_are_made_up_for_as_gptq_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from upcycle.ffn.rounding import ternary

    monkeypatch.setattr(ternary, "_BLOCK", 5)  # several blocks
    for seed in range(5):
        matrix, gram = drawn(seed)
        made = ternary_of_least_error(matrix, gram, 0.1)
        assert np.allclose(made.numpy(), slowly(matrix.double().numpy(), gram.numpy(), 0.1), atol=1e-6)
        errors = [
            ((rounded - matrix).double() @ gram * (rounded - matrix)).sum()
            for rounded in (made, nearest_ternary(matrix))
        ]
        assert errors[0] < errors[1]


def test_inputs_that_say_nothing_leave_the_nearest() -> None:
    matrix, gram = drawn()
    for nothing in (torch.zeros(C, C), torch.full((C, C), torch.nan), torch.eye(C)):
        assert torch.equal(ternary_of_least_error(matrix, nothing.double()), nearest_ternary(matrix))
    assert not torch.equal(ternary_of_least_error(matrix, gram), nearest_ternary(matrix))
