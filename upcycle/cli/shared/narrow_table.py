"""Leaves out columns of a table until it fits the terminal; the caller says in which order, and names them."""

from __future__ import annotations

from collections.abc import Sequence

_GAP = 2  # between columns


def fitting(
    columns: Sequence[str], rows: Sequence[Sequence[str]], width: int, expendable: Sequence[str]
) -> tuple[list[int], list[str]]:
    """Return the numbers of the columns that are shown, and the names of those that are left out.

    Args:
        columns: the header.
        rows: as many cells as ``columns``, each.
        width: of the terminal.
        expendable: names of columns, those that are left out first first.
    """
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    shown = list(range(len(columns)))
    for name in expendable:
        if sum(widths[i] for i in shown) + _GAP * (len(shown) - 1) <= width:
            break
        shown = [i for i in shown if columns[i] != name]
    left_out = [name for i, name in enumerate(columns) if i not in shown]
    return shown, left_out
