"""What becomes of documents longer than a row, against a loop over their tokens."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest

from upcycle.trainers.data.token_shards import TokenShard
from upcycle.trainers.data.too_long import fitted
from upcycle.trainers.recipe.data_recipe import TooLong

ROW = 6
# Documents as what is learned of each: 1 is, 0 is not.
FIRST = [[0, 1, 1], [0, 0, 0, 0, 0, 0, 1, 1], [1, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0, 0]]
SECOND = [[0, 0, 0, 1], [0, 0, 1, 0, 0, 0, 1], [1] * 20]


def shard(documents: list[list[int]]) -> TokenShard:
    tokens = np.array([5 if learned else ~5 for document in documents for learned in document], np.int32)
    return TokenShard(tokens, np.array(list(map(len, documents))), np.empty(0, np.uint64), "", True)


@pytest.mark.parametrize("rule", get_args(TooLong))
def test_every_rule(rule: Any) -> None:
    shards, of = [shard(FIRST), shard(SECOND)], [(0, each) for each in FIRST] + [(1, each) for each in SECOND]
    begins = np.concatenate([np.cumsum(each.lengths) - each.lengths for each in shards])
    lengths = np.concatenate([each.lengths for each in shards])
    found = fitted(shards, np.array([number for number, _ in of]), begins, lengths, ROW, rule)
    expected, cut, dropped, emptied = [], 0, 0, 0
    for number, (_, document) in enumerate(of):
        start, end = 0, len(document)
        if rule == "keep_start":
            end = min(end, ROW)
        elif rule == "keep_end":
            start = max(0, end - ROW)
        elif rule == "drop" and end > ROW:
            dropped += 1
            continue
        if rule != "split" and not any(document[start + 1 : end]):
            emptied += 1
            continue
        cut += end - start < len(document)
        expected.append((number, int(begins[number]) + start, end - start))
    assert list(zip(*(part.tolist() for part in (found.kept, found.begin, found.length)), strict=True)) == expected
    assert (found.cut, found.dropped, found.emptied) == (cut, dropped, emptied)
    if rule == "keep_start":
        assert emptied == 2, "one lost its answer, one learned its first token only, which nothing predicts"
