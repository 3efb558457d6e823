"""A cache on disk of a dense parent's next-token distributions: written when a row first comes, read whenever it comes again.

A row is identified by its tokens and positions: its order, rank and run do not matter. L positions, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from upcycle.errors import CheckpointError, UsageError
from upcycle.files.atomic_files import write_whole
from upcycle.files.formats.parsing import read_json
from upcycle.files.hashing import hash_file
from upcycle.files.output.ownership import cannot_write
from upcycle.trainers.data.packing import PackedBatch
from upcycle.trainers.distillation.truncated_logits import TopLogits

MANIFEST = "cache.json"


def parent_identity(parent: Path, dtype: str, top_p: float, most: int) -> dict[str, Any]:
    """What a cache depends on: the parent's configuration, a hash of all its weights, its dtype, and the truncation."""
    files = sorted([*parent.glob("*.safetensors"), parent / "config.json"])
    digest = hashlib.sha256("\n".join(f"{path.name} {hash_file(path)}" for path in files if path.is_file()).encode())
    return {"format": 1, "parent": digest.hexdigest(), "dtype": dtype, "top_p": top_p, "most": most}


def prepare_cache(folder: Path, identity: dict[str, Any]) -> None:
    """Create a cache's folder, or check that the cache in it was made with the same parent. One rank does this for all.

    Args:
        folder: the cache's.
        identity: what :func:`parent_identity` returns.

    Raises:
        UsageError: the cache was made with another parent or truncation, or the folder holds something else.
        EnvironmentFault: it cannot be written.
    """
    manifest = folder / MANIFEST
    if manifest.is_file():
        found = read_json(manifest)
        different = [key for key in identity if found.get(key) != identity[key]]
        if different:
            key = different[0]
            raise UsageError(
                f"distillation.cache: {folder} was made with another {key}: {found.get(key)} instead of {identity[key]}",
                hint="choose another folder, or remove this one",
            )
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UsageError(f"distillation.cache: {folder} holds something else", hint="choose an empty folder")
        write_whole(manifest, lambda path: path.write_text(json.dumps(identity) + "\n", encoding="utf-8"))
    except OSError as fault:
        raise cannot_write(folder, fault) from None


class LogitCache:
    """A cache of rows; ``read`` and ``written`` count those that were found and those that were added.

    Args:
        folder: one that :func:`prepare_cache` has prepared.
        top_p: how much of the probability the kept tokens of each position must have together.
        most: how many tokens are kept per position, at most.
    """

    def __init__(self, folder: Path, top_p: float, most: int) -> None:
        self.folder, self.top_p, self.most = folder, top_p, most
        self.read = self.written = 0

    def targets(
        self,
        batch: PackedBatch,
        run: Callable[[PackedBatch], torch.Tensor],
        anywhere: Callable[[bool], bool] = bool,
    ) -> TopLogits:
        """The parent's distributions at all positions of a batch but each row's last, row after row.

        Args:
            batch: rows of packed documents.
            run: the parent's logits ``[1, L, V]`` of a batch of one row; called for rows that are missing. Rows are run one by one,
                so that what is kept does not depend on the rows beside them.
            anywhere: whether a row is missing on any rank, given whether it is missing here: the row is run then. Ranks that share
                a parent's weights must run it together.

        Raises:
            CheckpointError: a file of the cache is damaged.
            EnvironmentFault: a row cannot be written.
        """
        return joined_rows([self._row(_one(batch, row), run, anywhere) for row in range(len(batch.ids))])

    def _row(
        self, row: PackedBatch, run: Callable[[PackedBatch], torch.Tensor], anywhere: Callable[[bool], bool]
    ) -> TopLogits:
        path = self._path(row)
        there = path.is_file()
        logits = run(row) if anywhere(not there) else None
        if there:
            self.read += 1
            found = TopLogits.load(path)
            if len(found.tokens) != row.ids.shape[1] - 1:
                raise CheckpointError(
                    f"{path} holds another number of positions than its row", hint="remove it, and it is made again"
                )
            return found
        assert logits is not None
        made = TopLogits.of(logits[0, :-1], self.top_p, self.most)
        try:
            path.parent.mkdir(exist_ok=True)
            write_whole(path, made.save)
        except OSError as fault:
            raise cannot_write(path, fault) from None
        self.written += 1
        return TopLogits.load(path)

    def _path(self, row: PackedBatch) -> Path:
        content = torch.stack([row.ids.flatten(), row.positions.flatten()]).cpu().contiguous()
        name = hashlib.sha256(content.numpy().tobytes()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"


def joined_rows(rows: Sequence[TopLogits]) -> TopLogits:
    """Several rows as one; those with fewer tokens per position are padded as :class:`TopLogits` describes."""
    width = max(row.tokens.shape[1] for row in rows)
    tokens, kept = [], []
    for row in rows:
        more = width - row.tokens.shape[1]
        tokens.append(torch.cat([row.tokens, row.tokens[:, :1].expand(-1, more)], dim=1))
        kept.append(torch.nn.functional.pad(row.log_probabilities, (0, more), value=-torch.inf))
    return TopLogits(torch.cat(tokens), torch.cat(kept), torch.cat([row.tail for row in rows]))


def _one(batch: PackedBatch, row: int) -> PackedBatch:
    """One row of a batch, as a batch."""
    return replace(batch.each(lambda part: part[row : row + 1]), domains=batch.domains[row : row + 1])
