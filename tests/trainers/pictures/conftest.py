"""A model of parts, its copies with experts, and conversations with images."""

from __future__ import annotations

from pathlib import Path

import pytest
from picture_chats import chats, pictured_llava
from picture_runs import COPIES

import upcycle


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictured_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def moe(llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts in all parts, with routers that are random."""
    folder = tmp_path_factory.mktemp("copies") / "moe"
    upcycle.convert(str(llava), folder, part="all", **COPIES)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight conversations about an image each."""
    return chats(tmp_path_factory.mktemp("data"))
