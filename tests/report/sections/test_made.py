"""The report says of every layer of a compressed model what is left of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import upcycle
from upcycle.report.data.made import made_data
from upcycle.report.data.subject import find_subject
from upcycle.report.sections.made import made_view


@pytest.mark.parametrize("method", ["block_drop", "reap"])
def test_what_is_left_of_every_layer(method: str, pico_moe: Callable[..., Path], tmp_path: Path) -> None:
    source, out = str(pico_moe("mixtral")), tmp_path / "out"
    text = {"text": "demo", "tokens": 256, "window": 32}
    upcycle.convert(
        source, out, method=method, keep=0.5, calibration=text, refit="none", verification={"enabled": False}
    )
    rows = made_view(made_data(find_subject(str(out))))["cuts"]
    assert [layer for layer, _, _ in rows] == ["0", "1"]
    assert all(refit == "none" for _, _, refit in rows)
    found = {experts for _, experts, _ in rows}
    if method == "block_drop":
        assert found == {"all", "left out"}
    else:
        assert all(len(experts.split(", ")) == 2 for experts in found)
