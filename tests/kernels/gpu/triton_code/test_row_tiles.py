"""The list of row tiles from a kernel, beside that of torch's operations, which ``tests/kernels`` compares with a loop."""

from __future__ import annotations

import pytest
import torch

from upcycle.kernels.gpu.row_tiles import in_one_launch, row_tiles
from upcycle.kernels.layout.dispatch import Dispatch, route


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "block"), [(9, 5, 2, 4), (1, 64, 8, 16), (300, 3, 1, 16), (33, 600, 4, 16)]
)
def test_like_torch(tokens: int, experts: int, top_k: int, block: int, device: torch.device) -> None:
    rng = torch.Generator().manual_seed(0)
    # Ids up to the number of experts: dropped slots are among them.
    ids = torch.stack([torch.randperm(experts + 1, generator=rng)[:top_k] for _ in range(tokens)])
    wanted = row_tiles(route(ids, experts), block)
    made = in_one_launch(route(ids.to(device), experts), block, wanted.count)
    assert torch.equal(made.expert.cpu(), wanted.expert)
    assert torch.equal(made.row.cpu(), wanted.row)
    assert made.block == block


def test_nothing(device: torch.device) -> None:
    dispatch: Dispatch = route(torch.empty(0, 2, dtype=torch.int64, device=device), 4)
    assert in_one_launch(dispatch, 16, 0).count == 0
