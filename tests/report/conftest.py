"""A pico conversion with everything a report can hold, and its report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from report_parts import COMPARED, HOSTILE, write_evaluated, write_log

import upcycle
from upcycle.report.collect import Wanted
from upcycle.report.write_report import Report, write_report


@pytest.fixture(scope="session")
def full_report(pico: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Calibrated, verified, trained and compared, with hostile names wherever a user or a file can give one."""
    folder = tmp_path_factory.mktemp("reports")
    out = folder / "model"
    calibration = {"text": "demo", "tokens": 512, "window": 64}
    keys = {"method": "random_split", "experts": 6, "top_k": 3, "shared": 2, "layers": "except-first:1"}
    upcycle.convert(str(pico("llama")), out, **keys, calibration=calibration, verification={"tokens": 64})
    write_log(folder / "log.jsonl", 1000)
    write_evaluated(out)
    static = COMPARED | {"method": "static", "baseline": "static", "ratio": 1.5, "recommended": False}
    results = [row | {"active": active} for row in (COMPARED, static) for active in (0.5, 0.75)]
    (out / "compare.json").write_text(json.dumps({"source": HOSTILE, "dense": {"a": 3.0}, "results": results}))
    hostile = folder / f"{HOSTILE.replace('/', '')}.txt"
    hostile.write_text("Some <b>bold</b> prose & more of it. " * 60, encoding="utf-8")
    return write_report(out, folder / "report.html", Wanted(["code", str(hostile)], 200, [HOSTILE, "def"]))
