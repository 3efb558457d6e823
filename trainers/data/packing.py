"""Packs documents into rows of one length. N documents, F fragments of them, R rows of L tokens."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from upcycle.trainers.data.masking import Masker
from upcycle.trainers.pictures.row_pictures import BatchPictures, PlacedPicture
from upcycle.trainers.recipe.data_recipe import Packing

Int64 = NDArray[np.int64]


class PackedRow(NamedTuple):
    """One row: ``[L]`` each of ids, positions, targets, and which positions hold a token; and its images in order."""

    ids: Int64
    positions: Int64
    targets: NDArray[np.bool_]
    unpadded: NDArray[np.bool_]
    pictures: tuple[PlacedPicture, ...] = ()


@dataclass(frozen=True)
class Rows:
    """Which fragment of which document lies in which row. Fragments are sorted by row, and by place within it."""

    document: Int64  # [F]
    start: Int64  # [F], the fragment's first token within its document
    length: Int64  # [F]
    first: Int64  # [R + 1], row r holds fragments first[r] to first[r + 1] - 1

    def __len__(self) -> int:
        return len(self.first) - 1


def pack_documents(lengths: Int64, row: int, how: Packing) -> Rows:
    """Pack documents of ``lengths`` ``[N]``, in this order, into rows of ``row`` tokens; every token comes once.

    - ``concatenate``: one document after another, cut at every row's end; only the last row is not full.
    - ``best_fit``: a document longer than a row fills whole rows and leaves a rest. Rests, longest first, go uncut into the
      fullest row with room for them (best-fit decreasing; Ding et al. 2024, arXiv 2404.10830).
    - ``alone``: the same, but each rest has a row for itself, most of which is padding if documents are short.
    """
    return _concatenated(lengths, row) if how == "concatenate" else _whole(lengths, row, how)


def layout(lengths: Int64, row: int) -> tuple[Int64, NDArray[np.bool_]]:
    """Positions ``[L]`` that restart at every fragment of a row, and targets ``[L]``: all tokens but each fragment's first.

    The rest of the row is padding, without targets. Its positions begin at 1: since a 0 is always the beginning of a fragment, a
    fragment of one token differs from a single token of padding.

    Args:
        lengths: of the row's fragments.
        row: L.
    """
    used = int(lengths.sum())
    all_lengths = np.append(lengths, row - used) if used < row else lengths
    begins = np.cumsum(all_lengths) - all_lengths
    positions = np.arange(row) - np.repeat(begins, all_lengths)
    positions[used:] += 1
    return positions, (positions > 0) & (np.arange(row) < used)


def _concatenated(lengths: Int64, row: int) -> Rows:
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    # A fragment begins where a document or a row does.
    cuts = np.unique(np.concatenate([ends - lengths, np.arange(0, total, row)]))
    cuts = cuts[cuts < total]
    document = np.searchsorted(ends, cuts, side="right")
    length = np.diff(np.append(cuts, total))
    first = np.append(np.searchsorted(cuts, np.arange(0, total, row)), len(cuts))
    return Rows(document, cuts - (ends - lengths)[document], length, first)


def _whole(lengths: Int64, row: int, how: Packing) -> Rows:
    whole, rest = np.divmod(lengths, row)
    full = np.repeat(np.arange(len(lengths)), whole)
    full_start = (np.arange(len(full)) - np.repeat(np.cumsum(whole) - whole, whole)) * row
    rests = np.flatnonzero(rest)
    if how == "alone":
        place = np.arange(len(rests))
    else:
        rests = rests[np.argsort(-rest[rests], kind="stable")]
        place = _best_fit(rest[rests].tolist(), row)
    order = np.argsort(place, kind="stable")
    document = np.concatenate([full, rests[order]])
    start = np.concatenate([full_start, (whole * row)[rests[order]]])
    length = np.concatenate([np.full(len(full), row), rest[rests[order]]])
    bins = np.bincount(place) if len(place) else np.empty(0, np.int64)
    first = np.concatenate([np.arange(len(full) + 1), len(full) + np.cumsum(bins)])
    return Rows(document, start, length, first)


def _best_fit(lengths: list[int], row: int) -> Int64:
    """The row of each fragment, ``[F]``, for ``lengths`` sorted from longest to shortest."""
    rooms: list[int] = []  # sorted: how much room rows have left, each number once
    rows_with: dict[int, list[int]] = {}
    place = np.empty(len(lengths), np.int64)
    count = 0
    for number, length in enumerate(lengths):
        at = bisect_left(rooms, length)
        if at == len(rooms):
            chosen, room = count, row
            count += 1
        else:
            room = rooms[at]
            chosen = rows_with[room].pop()
            if not rows_with[room]:
                rooms.pop(at)
        place[number] = chosen
        left = room - length
        if left:
            same = rows_with.setdefault(left, [])
            if not same:
                insort(rooms, left)
            same.append(chosen)
    return place


@dataclass(frozen=True)
class PackedBatch:
    """Rows of token ids, each of which holds one or more documents or parts of them.

    :func:`upcycle.trainers.data.packed_attention.packed_forward` runs a model on it so that documents do not see each other.

    ``ids`` int64 ``[B, L]``; ``mask`` bool ``[B, L]``, the tokens that are targets: no padding, not the first token of a
    document or part, and of examples only answers; ``positions`` int64 ``[B, L]``, 0 at the first token of a document or part and
    nowhere else; ``domains`` the domain of each row; ``unpadded`` bool ``[B, L]``, the tokens that are no padding (``None``: targets
    and first tokens, which are all of text); ``compared`` bool ``[B, L]``, the answers of preferences, which are no targets (``None``:
    there are none). In a row of preferences, the worse answer's document follows the better one's.

    For a masked language model, ``mask`` are the tokens that it predicts at their own places, and ``given`` int64 ``[B, L]`` is what
    it reads. ``pictures`` are the rows' images, if the data have any.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    domains: tuple[str, ...]
    unpadded: torch.Tensor | None = None
    compared: torch.Tensor | None = None
    given: torch.Tensor | None = None
    pictures: BatchPictures | None = None

    @property
    def real(self) -> torch.Tensor:
        """Bool ``[B, L]``: all tokens that are not padding, whether or not they are targets."""
        return self.mask | (self.positions == 0) if self.unpadded is None else self.unpadded

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors that there are, by their names."""
        return {name: part for name, part in vars(self).items() if isinstance(part, torch.Tensor)}

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> PackedBatch:
        """A batch of what ``change`` makes of every tensor ``[B, ...]``, with the same domains and images."""
        parts: dict[str, Any] = {name: change(part) for name, part in self.tensors.items()}
        return replace(self, **parts)

    def loaded(self) -> PackedBatch:
        """The same batch with its images read. An example with one that cannot be read has no targets and is not compared.

        Raises:
            UsageError: there were too many of them in this run.
        """
        if self.pictures is None or self.pictures.media is not None:
            return self
        pictures, lost = self.pictures.loaded()
        mask, compared = self.mask.clone(), None if self.compared is None else self.compared.clone()
        for row, start, end in lost:
            for part in (mask, compared):
                if part is not None:
                    part[row, start:end] = False
        return replace(self, pictures=pictures, mask=mask, unpadded=self.real, compared=compared)

    def masked(self, masker: Masker, rows: Sequence[object]) -> PackedBatch:
        """The same batch for a masked language model; ``rows`` are what each row's choice depends on beside the seed."""
        given, chosen = masker(self.ids, self.real, rows)
        return replace(self, mask=chosen, given=given, unpadded=self.real)

    def flat(self) -> PackedBatch:
        """The same documents in one long row ``[1, B L]``, with the same losses: flash attention needs this."""
        return self.each(lambda part: part.reshape(1, -1))

    def predicting(self, logits: torch.Tensor) -> torch.Tensor:
        """Of logits ``[B, L, V]``, those ``[B, L - 1, V]`` that predict the tokens at positions 1 and on."""
        return logits[:, :-1] if self.given is None else logits[:, 1:]

    def at_predicting(self, mask: torch.Tensor) -> torch.Tensor:
        """A mask ``[B, L - 1]`` of tokens at positions 1 and on, as one ``[B, L]`` of the logits that predict them."""
        return torch.nn.functional.pad(mask, (0, 1) if self.given is None else (1, 0), value=False)
