"""The images of packed rows, and what a model reads of them once they are needed. B rows, L positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from upcycle.trainers.pictures.pictures import Picture, Pictures


class PlacedPicture(NamedTuple):
    """An image, and the part of its row, from and to, that its example takes."""

    picture: Picture
    start: int
    end: int


class LostSpan(NamedTuple):
    """Positions ``start`` to ``end - 1`` of a row."""

    row: int
    start: int
    end: int


@dataclass(frozen=True)
class BatchPictures:
    """The images of a batch, row by row in the order of their tokens.

    ``media`` is what the model reads of them, by argument; ``None``: they were not read yet.
    """

    source: Pictures
    rows: tuple[tuple[PlacedPicture, ...], ...]
    media: Mapping[str, torch.Tensor] | None = None

    def loaded(self) -> tuple[BatchPictures, list[LostSpan]]:
        """Return the same with all images read, and the examples of those that cannot be.

        Raises:
            UsageError: more of them than may be.
        """
        placed = [(number, each) for number, row in enumerate(self.rows) for each in row]
        media, lost = self.source.media([each.picture for _, each in placed]) if placed else ({}, [])
        spans = [LostSpan(placed[place][0], placed[place][1].start, placed[place][1].end) for place in lost]
        return replace(self, media=media), spans

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> BatchPictures:
        """Return the same with what ``change`` makes of all that was read."""
        return replace(self, media={name: change(value) for name, value in (self.media or {}).items()})
