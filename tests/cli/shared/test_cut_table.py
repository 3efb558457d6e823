"""The table of compressions fits the terminal and names what it leaves out; the page has everything."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from upcycle.cli.shared import output
from upcycle.cli.shared.cut_table import CUT_HEADING, cut_page, show_cuts
from upcycle.evaluation.compressing.cut_comparison import CutComparison, CutResult, concerns, ranked, recommend_cuts

TIMING = {
    "device": "cpu",
    "instructions": "AVX2",
    "threads": 1,
    "dtype": "float32",
    "batch": 1,
    "prompt_tokens": 256,
    "prefill_seconds": 0.5,
    "decode_seconds": 0.01,
}


def comparison(**changes: Any) -> CutComparison:
    rows = []
    for method, refit, quality in (
        ("random_experts", "down", 1.4),
        ("naee", "none", 1.3),
        ("slim:score=leverage", "down", 1.2),
    ):
        rows.append(
            CutResult(
                keep=0.75,
                method=method,
                refit=refit,
                baseline=method == "random_experts",
                perplexity={"docs/code.txt": 12.34, "prose": 56.78, "everyday": 300.5},
                ratio=quality - 0.1,
                unseen_ratio=quality + 0.1,
                quality=quality,
                kl=0.123,
                agreement=0.4,
                experts=6,
                top_k=2,
                expert_width=72,
                bytes=1000,
                size_ratio=0.85,
                speeds={how: {"prefill": 1.11, "decode": 1.22} for how in ("grouped_mm", "upcycle")},
                speed=1.33,
                seconds=12.3,
                command=f"upcycle compress ./moe OUT --method {method}",
            )
        )
    results = recommend_cuts(ranked(rows), None, None)
    found = CutComparison(
        source="./moe",
        uncut={"docs/code.txt": 10.0, "prose": 50.0, "everyday": 280.0},
        uncut_bytes=1176,
        unseen=["everyday"],
        calibration=["docs/code.txt", "prose"],
        calibration_tokens=8192,
        evaluation_tokens=5120,
        continuations=32,
        continuation_tokens=32,
        observe_seconds=11.0,
        results=results,
        skipped=[],
        timing=TIMING,
        goal={},
        warnings=concerns(results),
    )
    return replace(found, **changes)


@pytest.mark.parametrize(
    ("width", "there", "gone"),
    [
        (200, ("own decode", "experts", "prose", "KL", "took"), ()),
        (100, ("size", "seen", "unseen", "quality", "same", "speed"), ("code", "stock prefill", "own decode")),
        (60, ("kept", "method", "refit", "seen", "unseen", "same"), ("KL", "took", "experts")),
    ],
)
def test_the_table_fits(
    width: int,
    there: tuple[str, ...],
    gone: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(output, "_FILE_WIDTH", width)
    show_cuts(comparison())
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    assert sum(line.startswith("75%") for line in lines) == 3  # no cell is folded
    said = " ".join(" ".join(lines).split())
    head, _, _ = " ".join(lines[0].split()).partition("75%")
    assert all(name in head for name in there)
    assert not any(name in head.split("  ") for name in gone)
    named = said.partition("left out")[2].partition(": a wider terminal")[0]
    assert all(name in named for name in gone)
    assert ("left out" in said) == bool(gone)
    assert all(name in head or name in named for name in ("KL", "took", "experts", "everyday", "own prefill"))


def test_what_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(output, "_FILE_WIDTH", 240)
    show_cuts(comparison())
    shown = capsys.readouterr()
    assert "75%   slim:score=leverage *  down    85%  1.100x  1.300x" in shown.out
    assert "slim:score=leverage with refit loses least of 2 at 75%: 1.200x" in shown.out
    assert "next is naee without refit, 1.300x; random experts 1.400x" in shown.out
    assert "upcycle compress ./moe OUT --method slim:score=leverage" in shown.out
    assert "at 75%, every compression loses much" in " ".join(shown.err.split())


def test_the_page_has_every_column_and_the_command() -> None:
    page = cut_page(comparison())
    assert page.startswith(CUT_HEADING)
    head, rule, *rows = page.splitlines()
    for name in ("seen", "unseen", "same", "KL", "code", "prose", "everyday", "stock decode", "own prefill", "took"):
        assert f"| {name} |" in head
    assert {line.count("|") for line in (head, rule, *rows[:3])} == {head.count("|")}
    assert "  `upcycle compress ./moe OUT --method slim:score=leverage`" in page
    assert "- warning: at 75%, every compression loses much" in page


def test_without_speed_and_without_text_of_another_kind() -> None:
    plain = comparison()
    rows = [replace(row, speed=None, speeds=None, unseen_ratio=None) for row in plain.results]
    page = cut_page(replace(plain, results=rows, timing=None, unseen=[], warnings=[]))
    head = page.splitlines()[0]
    assert "speed" not in head
    assert "unseen" not in head
    assert "- quality: as seen" in page
