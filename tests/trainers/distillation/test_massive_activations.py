"""How much tokens count whose activations are massive."""

from __future__ import annotations

import torch

from upcycle.trainers.distillation.massive_activations import MOST_MEDIANS, token_weights


def test_ordinary_tokens_all_count_the_same() -> None:
    squares = torch.rand(3, 50) + 0.1  # at most 11 times each other
    assert bool((token_weights(squares) == 1).all())


def test_a_massive_token_counts_as_32_median_ones_of_its_row() -> None:
    squares = torch.ones(2, 9).double()
    squares[0, 4], squares[1, 2] = 1e5, 20.0
    weighed = token_weights(squares) * squares
    assert weighed[0, 4].item() == MOST_MEDIANS and weighed[1, 2].item() == 20.0
    assert torch.equal(token_weights(squares[1:]), token_weights(squares)[1:])  # however rows are divided


def test_tokens_that_do_not_count_have_no_weight_and_no_say() -> None:
    squares = torch.tensor([[1.0, 1.0, 1e6, 1e6, 1e6], [5.0, 5.0, 5.0, 5.0, 5.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True, False, False], [False] * 5])
    weights = token_weights(squares, mask)
    assert weights[0].tolist() == [1.0, 1.0, MOST_MEDIANS / 1e6, 0.0, 0.0]
    assert weights[1].tolist() == [0.0] * 5


def test_rows_that_are_mostly_zero_are_left_as_they_are() -> None:
    assert token_weights(torch.tensor([0.0, 0.0, 0.0, 7.0])).tolist() == [1.0] * 4
