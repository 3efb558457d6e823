"""Rows summed to tokens: the same bits as adding them one after the other, and nothing else read."""

from __future__ import annotations

import pytest
import torch
from expert_cases import random_ids

from upcycle.kernels.cpu.combine import Combiner
from upcycle.kernels.layout.dispatch import route


def looped(
    rows: torch.Tensor, scores: torch.Tensor | None, slots: list[list[int]], slot_row: list[int]
) -> torch.Tensor:
    outputs = []
    for of_token in slots:
        total = torch.zeros(rows.shape[1], dtype=torch.float64)
        for slot in of_token:
            if slot_row[slot] >= 0:
                total += rows[slot_row[slot]].double() * (1 if scores is None else scores[slot].double())
        outputs.append(total)
    return torch.stack(outputs)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dropped", [True, False])
@pytest.mark.parametrize("dynamic", [True, False])
def test_sums(weighted: bool, dropped: bool, dynamic: bool) -> None:
    ids = random_ids(9, 3, 6)
    if dropped:
        ids[ids == 2] = 6
        ids[4] = 6
    offsets, slots = None, [[3 * token + k for k in range(3)] for token in range(9)]
    if dynamic:
        ids, numbers = ids.flatten(), [0, 5, 2, 0, 7, 1, 12, 0]
        offsets = torch.tensor([sum(numbers[:token]) for token in range(len(numbers) + 1)])
        slots = [list(range(offsets[token], offsets[token + 1])) for token in range(len(numbers))]
    dispatch = route(ids, 6, offsets)
    kept = int(dispatch.offsets[-1])
    scores = torch.rand(27) if weighted else None
    rows = torch.full((27, 40), torch.nan)
    rows[:kept] = torch.randn(kept, 40)
    if scores is not None:
        scores[dispatch.slot_row < 0] = torch.nan
    found = Combiner(dispatch, kept)(rows[:kept], scores)
    torch.testing.assert_close(
        found.double(), looped(rows, scores, slots, dispatch.slot_row.tolist()), rtol=1e-6, atol=1e-6
    )
    assert found.dtype == torch.float32
    double = Combiner(dispatch, kept)(rows.double(), None if scores is None else scores.double())
    torch.testing.assert_close(double, looped(rows, scores, slots, dispatch.slot_row.tolist()), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("tokens", "top_k"), [(0, 2), (3, 0), (4, 1)])
def test_few(tokens: int, top_k: int) -> None:
    dispatch = route(torch.zeros(tokens, top_k, dtype=torch.long), 2)
    rows = torch.randn(tokens * top_k, 8)
    found = Combiner(dispatch, len(rows))(rows, None)
    assert torch.equal(found, rows if top_k else torch.zeros(tokens, 8))


def test_all_dropped() -> None:
    dispatch = route(torch.full((3, 2), 4), 4)
    assert torch.equal(Combiner(dispatch, 0)(torch.empty(0, 8), torch.full((6,), torch.nan)), torch.zeros(3, 8))
