"""Makes ``from expert_cases import ...`` work, and poisons memory."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

_spec = importlib.util.spec_from_file_location("expert_cases", Path(__file__).with_name("expert_cases.py"))
assert _spec
assert _spec.loader
_module = importlib.util.module_from_spec(_spec)
sys.modules["expert_cases"] = _module
_spec.loader.exec_module(_module)


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
