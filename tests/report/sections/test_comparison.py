"""The report shows a comparison of compressions as ``upcycle compare MOE --out compare.json`` wrote it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import upcycle
from upcycle.evaluation.compressing.compare_compressions import compare_compressions
from upcycle.report.collect import Wanted
from upcycle.report.sections.comparison import comparison_view


@pytest.mark.long
def test_compressions_are_shown(pico_moe: Callable[..., Path], tmp_path: Path) -> None:
    moe, out = str(pico_moe("mixtral")), tmp_path / "out"
    upcycle.convert(moe, out, method="expert_upcycling", verification={"enabled": False})
    sizes = {"calibration_tokens": 256, "window": 32, "tokens": 64, "timed": False}
    found = compare_compressions(moe, compress=["frequency"], keep=[0.75, 0.5], **sizes).as_dict()
    (out / "compare.json").write_text(json.dumps(found))
    view = comparison_view(found)
    assert len(view["rows"]) == 8
    assert all(len(cells) == len(view["columns"]) for cells, _ in view["rows"])
    assert sum(recommended for _, recommended in view["rows"]) == 2
    assert len(view["plots"]) == 1
    upcycle.write_report(out, tmp_path / "page.html", Wanted(run=False))
    page = (tmp_path / "page.html").read_text()
    assert "What does a byte buy?" in page
    assert "Compressions of " in page
    for row in found["results"]:
        assert f"{row['quality']:.3f}x" in page
        assert f'<td class="number">{row["agreement"]:.0%}</td>' in page
    assert page.count("frequency (recommended)") == 2
