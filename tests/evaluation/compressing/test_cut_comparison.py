"""Rows are ranked, recommended and warned of by their numbers."""

from __future__ import annotations

from typing import Any

import pytest

from upcycle.errors import UsageError
from upcycle.evaluation.compressing.cut_comparison import CutResult, concerns, ranked, recommend_cuts


def row(method: str, keep: float, quality: float, size: int, **changes: Any) -> CutResult:
    given: dict[str, Any] = {
        "keep": keep,
        "method": method,
        "refit": "down",
        "baseline": method == "random_experts",
        "perplexity": {},
        "ratio": quality,
        "unseen_ratio": quality,
        "quality": quality,
        "kl": 0.1,
        "agreement": 0.9,
        "experts": 4,
        "top_k": 2,
        "expert_width": 8,
        "bytes": size,
        "size_ratio": size / 100,
        "speeds": None,
        "speed": None,
        "seconds": 1.0,
        "command": f"make {method} {keep}",
    }
    return CutResult(**{**given, **changes})


ROWS = [
    row("reap", 0.5, 1.30, 60, speed=1.5),
    row("naee", 0.5, 1.20, 60, speed=1.5),
    row("random_experts", 0.5, 1.50, 60),
    row("naee", 0.75, 1.05, 80, speed=1.2),
    row("slim", 0.75, 1.10, 85, speed=1.1),
    row("lower_top_k", 0.5, 1.01, 100, speed=1.9),
    row("random_experts", 0.75, 1.02, 80, speed=1.2),
]


def marked(rows: list[CutResult], what: str) -> set[tuple[str, float]]:
    return {(one.method, one.keep) for one in rows if getattr(one, what)}


def test_rows_are_sorted_and_the_frontier_is_of_quality_against_size() -> None:
    found = ranked(ROWS)
    assert [one.keep for one in found] == [0.75, 0.75, 0.75, 0.5, 0.5, 0.5, 0.5]
    assert [one.quality for one in found[:3]] == [1.02, 1.05, 1.10]
    # One that is as large as the uncut model is beaten by it, whatever it loses.
    assert marked(found, "frontier") == {("naee", 0.5), ("random_experts", 0.75)}


def test_the_best_method_of_each_size_is_recommended_with_its_reason() -> None:
    found = recommend_cuts(ranked(ROWS), None, None)
    assert marked(found, "recommended") == {("naee", 0.5), ("naee", 0.75)}
    best = next(one for one in found if one.recommended and one.keep == 0.5)
    assert best.command == "make naee 0.5"
    assert best.reason is not None
    for words in ("loses least of 2 at 50%: 1.200x", "next is reap with refit, 1.300x", "random experts 1.500x", "90%"):
        assert words in best.reason
    assert all((one.command is None) == (not one.recommended) for one in found)
    assert all((one.reason is None) == (not one.recommended) for one in found)


def test_goals() -> None:
    assert marked(recommend_cuts(ROWS, 1.4, None), "recommended") == {("lower_top_k", 0.5)}
    assert marked(recommend_cuts(ROWS, None, 1.25), "recommended") == {("naee", 0.5)}
    assert marked(recommend_cuts(ROWS, None, 1.15), "recommended") == {("naee", 0.75)}
    with pytest.raises(UsageError, match=r"no compression is 3x as fast as the uncut model: the fastest is 1\.90x"):
        recommend_cuts(ROWS, 3, None)
    with pytest.raises(UsageError, match=r"no compression stays within 1\.01x .* the best is 1\.050x"):
        recommend_cuts(ROWS, None, 1.01)


def said(rows: list[CutResult]) -> str:
    return "\n".join(concerns(recommend_cuts(rows, None, None)))


def test_what_a_user_must_know() -> None:
    assert "naee with refit at 75% is no better than random experts: 1.050x against 1.020x" in said(ROWS)
    good = [row("naee", 0.75, 1.05, 80), row("random_experts", 0.75, 1.2, 80)]
    assert said(good) == ""
    lost = [row("naee", 0.5, 1.3, 60, ratio=1.05, unseen_ratio=1.6), row("reap", 0.5, 1.4, 60, unseen_ratio=1.5)]
    assert "at 50%, every compression loses much on text of a kind that was not calibrated on: 1.50x at best" in said(
        lost
    )
    assert (
        "naee with refit at 50% loses much more on text of a kind that was not calibrated on: 1.60x against 1.05x"
        in said(lost)
    )
    one_holds = [*lost, row("hc_smoe", 0.5, 1.5, 60, ratio=2.0, unseen_ratio=1.2)]
    assert "every compression" not in said(one_holds)
    drawn_alone = [row("naee", 0.5, 1.3, 60, unseen_ratio=1.5), row("random_experts", 0.5, 1.4, 60, unseen_ratio=1.1)]
    assert "every compression" in said(drawn_alone)
    assert "writes other words than the uncut model: 30%" in said([row("naee", 0.75, 1.05, 80, agreement=0.3)])
    assert said([row("naee", 0.75, 1.05, 80, unseen_ratio=None)]) == ""
