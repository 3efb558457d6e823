"""The greedy assignment is that of the pair-by-pair loop."""

from __future__ import annotations

import pytest
import torch

from upcycle.splitters.grouping.greedy_assignment import greedy_assignment


def pair_by_pair(scores: torch.Tensor, room: list[int], extra: int) -> list[int]:
    """The definition: all pairs, best first."""
    pairs = sorted((-scores[n, g].item(), n, g) for n in range(scores.shape[0]) for g in range(scores.shape[1]))
    labels, left = [-1] * len(scores), list(room)
    while -1 in labels:
        for _, n, g in pairs:
            if labels[n] < 0 and (left[g] > 0 or (left[g] == 0 and extra > 0)):
                labels[n] = g
                extra -= left[g] == 0
                left[g] -= 1
                break
    return labels


@pytest.mark.parametrize("seed", range(40))
def test_equals_the_loop(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    points, groups = 3 + seed, 1 + seed % 7
    scores = torch.rand(points, groups, generator=rng)
    if seed % 2:
        scores = (scores * 4).round()  # many ties
    size, extra = divmod(points, groups)
    labels = greedy_assignment(scores, torch.full((groups,), size), extra)
    assert labels.tolist() == pair_by_pair(scores, [size] * groups, extra)
    counts = torch.bincount(labels, minlength=groups)
    assert counts.max() - counts.min() <= 1


def test_groups_of_different_room() -> None:
    scores = torch.rand(12, 4, generator=torch.Generator().manual_seed(1))
    room = torch.tensor([0, 7, 2, 5])
    labels = greedy_assignment(scores, room)
    assert labels.tolist() == pair_by_pair(scores, room.tolist(), 0)
    assert (torch.bincount(labels, minlength=4) <= room).all()


def test_scores_that_say_nothing() -> None:
    for scores in (torch.zeros(10, 3), torch.full((10, 3), -torch.inf), torch.full((10, 3), torch.nan)):
        counts = torch.bincount(greedy_assignment(scores, torch.full((3,), 3), extra=1))
        assert sorted(counts.tolist()) == [3, 3, 4]
    assert greedy_assignment(torch.zeros(0, 3), torch.zeros(3, dtype=torch.int64)).tolist() == []
