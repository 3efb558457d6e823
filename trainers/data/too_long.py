"""What becomes of documents longer than a row, and of examples of which nothing that is learned is left. N documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from upcycle.trainers.data.packing import Int64
from upcycle.trainers.data.token_shards import TokenShard
from upcycle.trainers.recipe.data_recipe import TooLong


@dataclass(frozen=True)
class Fitted:
    """What is left of documents: which of them are kept, where their tokens begin, and how many there are.

    ``cut`` is the number of documents that lost a part, ``dropped`` of those left out as too long, ``emptied`` of those left out
    because nothing of them is learned any more.
    """

    kept: Int64  # [N kept], indices
    begin: Int64  # [N kept]
    length: Int64  # [N kept]
    cut: int = 0
    dropped: int = 0
    emptied: int = 0


def fitted(shards: Sequence[TokenShard], shard: Int64, begin: Int64, length: Int64, row: int, rule: TooLong) -> Fitted:
    """Apply a rule to documents.

    Args:
        shards: where their tokens are.
        shard: ``[N]``, the index of each one's shard.
        begin: ``[N]``, where its tokens begin there.
        length: ``[N]``, how many it has.
        row: how many a row has.
        rule: ``split`` leaves all as they are. Those with images are dropped, whatever it says.
    """
    kept = np.arange(len(length))
    pictured = _pictured(shards, shard, begin) & (length > row)
    if pictured.any():  # a cut may divide an image
        some = np.flatnonzero(~pictured)
        rest = fitted(shards, shard[some], begin[some], length[some], row, rule)
        return replace(rest, kept=some[rest.kept], dropped=rest.dropped + int(pictured.sum()))
    if rule == "split":
        return Fitted(kept, begin, length)
    over = length > row
    if rule == "drop":
        kept = kept[~over]
        starts, ends = begin[kept], begin[kept] + length[kept]
    else:
        starts = begin + np.where(over, length - row, 0) if rule == "keep_end" else begin
        ends = starts + np.minimum(length, row)
    learned = _learned(shards, shard[kept], starts, ends)
    cut = over[kept]
    return Fitted(
        kept[learned],
        starts[learned],
        (ends - starts)[learned],
        cut=int((cut & learned).sum()),
        dropped=int(over.sum()) if rule == "drop" else 0,
        emptied=int((~learned).sum()),
    )


def _pictured(shards: Sequence[TokenShard], shard: Int64, begin: Int64) -> NDArray[np.bool_]:
    """Whether documents have images: bool ``[N]``."""
    found = np.zeros(len(begin), bool)
    for number, each in enumerate(shards):
        mine = np.flatnonzero(shard == number) if each.pictures else ()
        if len(mine):
            found[mine] = [bool(pictures) for pictures in each.pictures_at(begin[mine])]
    return found


def _learned(shards: Sequence[TokenShard], shard: Int64, starts: Int64, ends: Int64) -> NDArray[np.bool_]:
    """Whether any token but the first, which nothing predicts, is learned: bool ``[N]``."""
    found = np.zeros(len(shard), bool)
    for number, each in enumerate(shards):
        mine = shard == number
        if mine.any():
            until = np.append(0, np.cumsum(each.tokens >= 0))
            found[mine] = until[ends[mine]] > until[np.minimum(starts[mine] + 1, ends[mine])]
    return found
