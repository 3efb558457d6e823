"""The frontier and the goals, on rows made by hand."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upcycle.errors import UsageError
from upcycle.evaluation.frontier import best_at_speed, fastest_within, frontier


@dataclass(frozen=True)
class Row:
    """A conversion by its two measures."""

    ratio: float
    time: float | None


SLOW, GOOD, QUICK, WORSE, UNTIMED = Row(1.05, 1.1), Row(1.1, 0.9), Row(1.3, 0.6), Row(1.4, 0.7), Row(1.0, None)
ROWS = [WORSE, SLOW, UNTIMED, QUICK, GOOD]


def test_the_frontier_goes_from_fast_to_good_and_leaves_out_what_another_beats() -> None:
    assert frontier(ROWS) == [QUICK, GOOD, SLOW]
    assert frontier([UNTIMED]) == []


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1))
def test_a_row_is_on_the_frontier_unless_another_is_as_good_in_both_and_better_in_one(pairs: list) -> None:
    rows = [Row(float(ratio), float(time)) for ratio, time in pairs]
    found = frontier(rows)
    for row in rows:
        beaten = any(
            other.ratio <= row.ratio and other.time <= row.time and (other.ratio, other.time) != (row.ratio, row.time)
            for other in rows
            if other.time is not None and row.time is not None
        )
        assert (row in found) == (not beaten)


def test_goals_choose_the_best_that_is_fast_enough_and_the_fastest_that_is_good_enough() -> None:
    assert best_at_speed(ROWS, 1.11) is GOOD
    assert best_at_speed(ROWS, 1.5) is QUICK
    assert fastest_within(ROWS, 1.2) is GOOD
    assert fastest_within(ROWS, 1.35) is QUICK
    assert fastest_within(ROWS, 1.05) is SLOW


def test_a_goal_that_no_row_meets_names_the_best() -> None:
    with pytest.raises(UsageError, match=r"2x as fast as the dense model: the fastest is 1\.67x"):
        best_at_speed(ROWS, 2.0)
    with pytest.raises(UsageError, match=r"within 1\.01x of the dense perplexity: the best is 1\.050x"):
        fastest_within(ROWS, 1.01)
    with pytest.raises(UsageError, match="no row was timed"):
        best_at_speed([UNTIMED], 1.1)
