"""Poisons memory, and counts what compiled code is given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that nobody has written holds NaN, and so does what an ended tensor left."""
    from upcycle.kernels.cpu import recycled_memory

    empty = recycled_memory.Recycler.empty
    monkeypatch.setattr(recycled_memory, "LEAST", 1)
    monkeypatch.setattr(recycled_memory.Recycler, "empty", lambda *told: empty(*told).fill_(torch.nan))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The inputs that the compiled kernel for whole blocks was given."""
    from upcycle.kernels.entry import whole_block

    made: list[Any] = []
    kernel = whole_block.few_blocks_output

    def note(*arguments: Any) -> Any:
        made.append(arguments[2])
        return kernel(*arguments)

    monkeypatch.setattr(whole_block, "few_blocks_output", note)
    return made
