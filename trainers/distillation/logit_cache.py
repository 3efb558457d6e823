"""A dense parent's next-token distributions on disk: written when a row is first met, read whenever it comes again.

A row is known by its tokens and positions, so that it does not matter in which order, on which rank or in which run it comes.
L positions, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from upcycle.errors import CheckpointError, UsageError
from upcycle.files.atomic_files import write_whole
from upcycle.files.formats.parsing import read_json
from upcycle.files.hashing import hash_file
from upcycle.files.output.ownership import cannot_write
from upcycle.trainers.data.batches import PackedBatch
from upcycle.trainers.distillation.truncated_logits import TopLogits

MANIFEST = "cache.json"


def parent_identity(parent: Path, dtype: str, top_p: float, most: int) -> dict[str, Any]:
    """What a cache must have been made with: the parent's configuration and every byte of its weights, and the truncation."""
    files = sorted([*parent.glob("*.safetensors"), parent / "config.json"])
    digest = hashlib.sha256("\n".join(f"{path.name} {hash_file(path)}" for path in files if path.is_file()).encode())
    return {"format": 1, "parent": digest.hexdigest(), "dtype": dtype, "top_p": top_p, "most": most}


def prepare_cache(folder: Path, identity: dict[str, Any]) -> None:
    """Make the folder, or see that what is in it was made with the same parent; one rank does this for all.

    Raises:
        UsageError: it was made with something else, or holds something else.
        EnvironmentFault: it cannot be written.
    """
    manifest = folder / MANIFEST
    if manifest.is_file():
        found = read_json(manifest)
        different = [key for key in identity if found.get(key) != identity[key]]
        if different:
            key = different[0]
            raise UsageError(
                f"distillation.cache: {folder} was made with another {key}: {found.get(key)}, and now it is {identity[key]}",
                hint="name another folder, or remove this one",
            )
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UsageError(f"distillation.cache: {folder} holds something else", hint="name an empty folder")
        write_whole(manifest, lambda path: path.write_text(json.dumps(identity) + "\n", encoding="utf-8"))
    except OSError as fault:
        raise cannot_write(folder, fault) from None


class LogitCache:
    """The rows of one cache.

    Args:
        folder: what :func:`prepare_cache` has seen.
        top_p: of every position the most probable tokens that have so much of the probability are kept.
        most: but so many at most.
    """

    def __init__(self, folder: Path, top_p: float, most: int) -> None:
        self.folder, self.top_p, self.most = folder, top_p, most
        self.read = self.written = 0

    def targets(self, batch: PackedBatch, run: Callable[[PackedBatch], torch.Tensor]) -> TopLogits:
        """The parent's distributions at all positions of a batch but each row's last, rows one behind the other.

        Args:
            batch: rows of packed documents.
            run: gives the parent's logits ``[1, L, V]`` of a batch of one row; asked for rows that are not there yet. Rows are run
                one by one, so that what is kept does not depend on the rows beside them.

        Raises:
            CheckpointError: a file of the cache is damaged.
            EnvironmentFault: a row cannot be written.
        """
        return joined([self._row(_one(batch, row), run) for row in range(len(batch.ids))])

    def _row(self, row: PackedBatch, run: Callable[[PackedBatch], torch.Tensor]) -> TopLogits:
        path = self._path(row)
        if path.is_file():
            self.read += 1
            found = TopLogits.load(path)
            if len(found.tokens) != row.ids.shape[1] - 1:
                raise CheckpointError(f"{path} is of another length", hint="remove it, and it is made again")
            return found
        made = TopLogits.of(run(row)[0, :-1], self.top_p, self.most)
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


def joined(rows: Sequence[TopLogits]) -> TopLogits:
    """Several rows as one; narrower ones are filled up as :class:`TopLogits` has it."""
    width = max(row.tokens.shape[1] for row in rows)
    tokens, kept = [], []
    for row in rows:
        more = width - row.tokens.shape[1]
        tokens.append(torch.cat([row.tokens, row.tokens[:, :1].expand(-1, more)], dim=1))
        kept.append(torch.nn.functional.pad(row.log_probabilities, (0, more), value=-torch.inf))
    return TopLogits(torch.cat(tokens), torch.cat(kept), torch.cat([row.tail for row in rows]))


def _one(batch: PackedBatch, row: int) -> PackedBatch:
    which = slice(row, row + 1)
    return PackedBatch(batch.ids[which], batch.mask[which], batch.positions[which], batch.domains[which])
