"""The list of row tiles against a loop over experts."""

from __future__ import annotations

import pytest
import torch

from upcycle.kernels.gpu.row_tiles import row_tiles
from upcycle.kernels.layout.dispatch import route


@pytest.mark.parametrize("block", [1, 4, 16])
@pytest.mark.parametrize(
    ("ids", "experts"),
    [
        ([[0, 1], [1, 2], [0, 2]], 3),
        ([[1, 3]] * 9, 5),
        ([[2]] * 37, 4),
        ([[0, 1, 2, 3, 4]] * 8, 5),
        ([[3, 0], [3, 3], [1, 3]], 3),
        ([[2, 2]] * 3, 2),
        ([[0]], 64),
    ],
)
def test_against_a_loop(ids: list[list[int]], experts: int, block: int) -> None:
    dispatch = route(torch.tensor(ids), experts)
    expected, first = [], 0
    for expert in range(experts):
        count = sum(row.count(expert) for row in ids)
        expected += [(expert, first + start) for start in range(0, count, block)]
        first += count
    made = row_tiles(dispatch, block)
    slots = len(ids) * len(ids[0])
    assert made.count == min(-(-slots // block) + experts, slots)
    used = len(expected)
    assert list(zip(made.expert.tolist(), made.row.tolist(), strict=True))[:used] == expected
    assert set(made.expert[used:].tolist()) <= {-1}
    assert made.expert.dtype == made.row.dtype == torch.int32


def test_no_slots() -> None:
    made = row_tiles(route(torch.empty(0, 2, dtype=torch.int64), 4), 16)
    assert made.count == 0
    assert made.expert.shape == made.row.shape == (0,)


def test_without_values() -> None:
    """Sizes come from shapes alone: on the meta device there is nothing else."""
    from upcycle.kernels.layout.dispatch import Dispatch

    def empty(size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    dispatch = Dispatch(empty(6), empty(6), empty(6), empty(4, torch.int64), None, 3, 2)
    assert row_tiles(dispatch, 4).expert.shape == (5,)
