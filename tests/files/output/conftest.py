"""An empty folder to put OUT into, what a new result holds, and no waiting for the disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from folder_cases import content, result


@pytest.fixture
def new(tmp_path: Path) -> dict[str, str]:
    """The files of a new result."""
    return content(result(tmp_path / "reference" / "new", "new"))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty folder."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody cuts the power of a test."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
