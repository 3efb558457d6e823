"""Columns are left out until the table fits, in the given order."""

from __future__ import annotations

from upcycle.cli.shared.narrow_table import fitting

COLUMNS = ["name", "a", "bb", "c"]
ROWS = [["long name", "1", "22", "3"], ["x", "1", "2", "33333"]]  # 9 + 1 + 2 + 5, and three gaps of two


def test_all_are_shown_where_there_is_room() -> None:
    assert fitting(COLUMNS, ROWS, 23, ["a", "c"]) == ([0, 1, 2, 3], [])


def test_no_more_are_left_out_than_needed() -> None:
    assert fitting(COLUMNS, ROWS, 22, ["a", "c"]) == ([0, 2, 3], ["a"])
    assert fitting(COLUMNS, ROWS, 20, ["a", "c"]) == ([0, 2, 3], ["a"])
    assert fitting(COLUMNS, ROWS, 19, ["a", "c"]) == ([0, 2], ["a", "c"])


def test_others_are_never_left_out() -> None:
    assert fitting(COLUMNS, ROWS, 1, ["c", "a"]) == ([0, 2], ["a", "c"])
