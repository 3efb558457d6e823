"""Clusters of a zoo, and greedy merging inside them, on measurements that are made up."""

from __future__ import annotations

import pytest
import torch

from upcycle.methods.mixing.model_glue import clusters_of, merge_greedily


def zoo(pairs: dict[tuple[int, int], float], count: int) -> torch.Tensor:
    found = torch.eye(count, dtype=torch.float64)
    for (i, j), value in pairs.items():
        found[i, j] = found[j, i] = value
    return found


def test_models_are_compared_with_the_first_of_a_family() -> None:
    # 2 resembles 1, but not 0, which is the family's first; 3 resembles 0.
    similarity = zoo({(0, 1): 0.97, (1, 2): 0.99, (0, 2): 0.94, (0, 3): 0.96, (1, 3): 0.1}, 4)
    assert clusters_of(similarity, 0.95) == [[0, 1, 3], [2]]
    assert clusters_of(similarity, 0.9) == [[0, 1, 2, 3]]
    assert clusters_of(similarity, 0.97) == [[0], [1, 2], [3]]  # more than the threshold, not as much
    assert clusters_of(similarity, 1.0) == [[0], [1], [2], [3]]


def test_a_model_that_resembles_no_family_opens_one() -> None:
    assert clusters_of(zoo({(0, 1): 0.5, (1, 2): 0.99}, 3), 0.95) == [[0], [1, 2]]


def test_a_model_that_resembles_two_families_joins_the_first() -> None:
    assert clusters_of(zoo({(0, 1): 0.9, (0, 2): 0.96, (1, 2): 0.99}, 3), 0.95) == [[0, 2], [1]]


def test_the_running_average_leaves_out_what_harms() -> None:
    alone = {0: 12.0, 1: 10.0, 2: 11.0, 3: 13.0, 4: 14.0}
    asked = []

    def perplexity(row: dict[int, float]) -> float:
        asked.append({source: round(part, 12) for source, part in row.items()})
        return 99.0 if 0 in row else 10.0 - len(row) / 10

    row, steps = merge_greedily([0, 1, 2, 3, 4], alone, perplexity, search=False)
    assert asked == [  # the best first: 1, 2, 0, 3, 4
        {1: 0.5, 2: 0.5},
        {1: round(1 / 3, 12), 2: round(1 / 3, 12), 0: round(1 / 3, 12)},
        {1: round(1 / 3, 12), 2: round(1 / 3, 12), 3: round(1 / 3, 12)},
        {1: 0.25, 2: 0.25, 3: 0.25, 4: 0.25},
    ]
    assert row == pytest.approx({1: 0.25, 2: 0.25, 3: 0.25, 4: 0.25})
    assert [(step.source, step.kept) for step in steps] == [(2, True), (0, False), (3, True), (4, True)]
    assert [step.coefficient for step in steps] == pytest.approx([1 / 2, 2 / 3, 2 / 3, 3 / 4])
    assert [(step.before, step.perplexity) for step in steps] == [(10, 9.8), (9.8, 99), (9.8, 9.7), (9.7, 9.6)]


def test_a_merge_as_good_is_kept() -> None:
    row, (step,) = merge_greedily([5, 7], {5: 3.0, 7: 3.0}, lambda _: 3.0, search=False)
    assert (row, step.source, step.kept) == ({5: 0.5, 7: 0.5}, 7, True)


def test_the_search_keeps_the_best_coefficient_not_the_last() -> None:
    tried = []

    def perplexity(row: dict[int, float]) -> float:
        tried.append(row[0])
        return 1 + abs(row[0] - 0.7)

    row, (step,) = merge_greedily([0, 1], {0: 2.0, 1: 3.0}, perplexity, search=True)
    assert tried == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    assert row == pytest.approx({0: 0.7, 1: 0.3})
    assert (step.coefficient, step.kept) == (0.7, True)
    row, (step,) = merge_greedily([0, 1], {0: 0.5, 1: 3.0}, perplexity, search=True)
    assert (row, step.kept) == ({0: 1.0}, False)
