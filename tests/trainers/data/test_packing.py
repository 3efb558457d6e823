"""Packing keeps every token once, in order; best fit against a plain restatement."""

from __future__ import annotations

import numpy as np
import pytest

from upcycle.trainers.data.packing import Rows, layout, pack_documents
from upcycle.trainers.recipe.data_recipe import Packing

ROW = 16
CASES = {
    "mixed": [5, 40, 3, 16, 1, 31, 2, 9, 9, 7, 12, 4, 4],
    "one": [3],
    "exact": [16, 32],
    "none": [],
    "many": np.random.default_rng(0).integers(1, 60, 300).tolist(),
}


def fragments(rows: Rows) -> list[list[tuple[int, int, int]]]:
    """``(document, start, length)`` of each row."""
    flat = list(zip(rows.document.tolist(), rows.start.tolist(), rows.length.tolist(), strict=True))
    return [flat[rows.first[r] : rows.first[r + 1]] for r in range(len(rows))]


@pytest.mark.parametrize("how", ["best_fit", "concatenate", "alone"])
@pytest.mark.parametrize("case", CASES)
def test_packing_places_every_token_once(case: str, how: Packing) -> None:
    lengths = CASES[case]
    found = fragments(pack_documents(np.array(lengths, np.int64), ROW, how))
    assert all(0 < sum(size for *_, size in row) <= ROW for row in found)
    tokens = sorted(
        (document, at) for row in found for document, start, size in row for at in range(start, start + size)
    )
    assert tokens == [(document, at) for document, size in enumerate(lengths) for at in range(size)]


@pytest.mark.parametrize("case", CASES)
def test_concatenation_is_the_documents_in_order(case: str) -> None:
    lengths = CASES[case]
    found = fragments(pack_documents(np.array(lengths, np.int64), ROW, "concatenate"))
    stream = [(document, at) for document, size in enumerate(lengths) for at in range(size)]
    assert [[(d, at) for d, start, size in row for at in range(start, start + size)] for row in found] == [
        stream[at : at + ROW] for at in range(0, len(stream), ROW)
    ]


@pytest.mark.parametrize("case", CASES)
def test_best_fit_decreasing(case: str) -> None:
    lengths = CASES[case]
    rooms: list[int] = []
    rests = sorted((size % ROW for size in lengths if size % ROW), reverse=True)
    for size in rests:
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms[rooms.index(min(fitting))] -= size
        else:
            rooms.append(ROW - size)
    found = fragments(pack_documents(np.array(lengths, np.int64), ROW, "best_fit"))
    full = [row for row in found if len(row) == 1 and row[0][2] == ROW]
    assert len(full) == sum(size // ROW for size in lengths)
    assert sorted(ROW - sum(size for *_, size in row) for row in found if row not in full) == sorted(rooms)
    assert all(start % ROW == 0 for row in found for _, start, _ in row), "only documents longer than a row are cut"


def test_packing_alone_gives_each_document_its_rows() -> None:
    assert {len(row) for row in fragments(pack_documents(np.array(CASES["mixed"]), ROW, "alone"))} == {1}


@pytest.mark.parametrize(
    ("lengths", "positions", "targets"),
    [
        ([3, 1, 2], [0, 1, 2, 0, 0, 1], "011001"),
        ([3, 1], [0, 1, 2, 0, 1, 2], "011000"),  # padding has no 0
        ([3, 1, 1], [0, 1, 2, 0, 0, 1], "011000"),
        ([6], [0, 1, 2, 3, 4, 5], "011111"),
    ],
)
def test_positions_restart_and_document_ends_have_no_target(
    lengths: list[int], positions: list[int], targets: str
) -> None:
    found, mask = layout(np.array(lengths), 6)
    assert found.tolist() == positions
    assert "".join("01"[int(m)] for m in mask) == targets
