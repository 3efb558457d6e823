"""Writes safetensors shards tensor by tensor, and a journal from which a killed conversion continues.

Every shape is known in advance, so a shard's header is written first, and each tensor follows as soon as it is made. After each
unit (a layer), the journal records the running SHA-256 of the shard. When a conversion continues, the bytes on disk must give the
same digest, so that what a crash has damaged is found and written again.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from upcycle.checkpoints.output_layout import OutputEntry, Shard, Unit
from upcycle.errors import CheckpointError
from upcycle.files.formats.parsing import read_lines
from upcycle.files.formats.tensor_files import INDEX
from upcycle.files.formats.tensor_spec import CODES, ITEM_SIZE

if TYPE_CHECKING:
    import torch

PARTIAL = ".partial"
WAITING_BYTES = 1 << 26  # most bytes that may wait to be written
_READ_BLOCK = 1 << 24


class Journal:
    """Keeps the finished units of a conversion, one JSON line each, in ``folder/journal.jsonl``."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "journal.jsonl"
        self.digests: dict[str, str] = {}
        if self.path.exists():
            for entry in read_lines(self.path):
                self.digests[entry["unit"]] = entry["sha256"]
            self._rewrite()

    def _rewrite(self) -> None:
        lines = [json.dumps({"unit": unit, "sha256": digest}) + "\n" for unit, digest in self.digests.items()]
        self.path.write_text("".join(lines), encoding="utf-8")

    def forget(self, units: Iterable[str]) -> None:
        """Drop units whose bytes turned out to be missing or damaged."""
        for unit in units:
            self.digests.pop(unit, None)
        self._rewrite()

    def record(self, unit: str, digest: str) -> None:
        """Add a finished unit."""
        self.digests[unit] = digest
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"unit": unit, "sha256": digest}) + "\n")


class ShardWriter:
    """Writes one shard; ``done`` has the names of the units that an earlier run has already written.

    Used as a context manager: leaving the block without an error completes the file; after an error it stays under its temporary
    name and can be continued. Nothing is synced to the disk here: the workspace does that once, for the whole result.
    """

    def __init__(self, folder: Path, shard: Shard, journal: Journal) -> None:
        self._final = folder / shard.file
        self._partial = folder / (shard.file + PARTIAL)
        self._shard = shard
        self._journal = journal
        self._header = _header(shard)
        self._hash = hashlib.sha256()
        # A single thread for each task keeps the blocks in order.
        self._hashing, self._writing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._waiting: deque[tuple[int, Future[Any], Future[None]]] = deque()
        self._waiting_bytes = 0  # kept up to date rather than summed, as thousands of small experts may wait
        self._last: Future[None] | None = None
        self.done: set[str] = set()
        self.sha256 = ""

    def __enter__(self) -> ShardWriter:
        recorded = [unit.name for unit in self._shard.units if unit.name in self._journal.digests]
        if self._final.exists():
            self._final.rename(self._partial)
        length = self._verified_length(recorded) if recorded and self._partial.exists() else 0
        self._journal.forget(set(recorded) - self.done)
        self._file: BinaryIO = self._partial.open("r+b" if length else "wb", buffering=0)
        self._file.truncate(length)
        self._file.seek(length)
        if not length:
            self._enqueue(self._header)
        return self

    def _verified_length(self, recorded: list[str]) -> int:
        """Return the length up to which the file's digests match the journal, and set ``done`` and the running hash to it."""
        position = 0
        with self._partial.open("rb") as file:
            end = len(self._header)
            for unit in self._shard.units:
                end += unit.nbytes
                running = self._hash.copy()
                if unit.name not in recorded or not _extend(running, file, end - file.tell()):
                    break
                if running.hexdigest() != self._journal.digests[unit.name]:
                    break
                self._hash, position = running, end
                self.done.add(unit.name)
        if not self.done:
            self._hash = hashlib.sha256()
        return position

    def write(self, entry: OutputEntry, blocks: Iterable[torch.Tensor]) -> None:
        """Write one tensor as consecutive blocks.

        Raises:
            CheckpointError: the blocks do not fill the planned shape, which would be a bug.
        """
        import torch

        written = 0
        for block in blocks:
            data = block.contiguous().view(-1).view(torch.uint8).numpy()
            self._enqueue(data)
            written += data.nbytes
        if written != entry.spec.nbytes:
            raise CheckpointError(f"{entry.name}: wrote {written} bytes, planned {entry.spec.nbytes}")

    def _enqueue(self, data: Any) -> None:
        # Hashing and writing release the interpreter lock, so both run while the caller makes the next blocks.
        size = memoryview(data).nbytes
        while self._waiting and size + self._waiting_bytes > WAITING_BYTES:
            self._wait_for_oldest()
        hashed = self._hashing.submit(self._hash.update, data)
        self._last = self._writing.submit(self._append, data, self._last)
        self._waiting.append((size, hashed, self._last))
        self._waiting_bytes += size

    def _append(self, data: Any, previous: Future[None] | None) -> None:
        if previous:
            previous.result()  # raises if the block before failed, so that nothing is written after it
        view, done = memoryview(data).cast("B"), 0
        while done < len(view):
            done += self._file.write(view[done:])

    def _wait_for_oldest(self) -> None:
        """Wait until the oldest block or record is written, and raise the error that writing it met."""
        size, hashed, written = self._waiting.popleft()
        self._waiting_bytes -= size
        hashed.result()
        written.result()

    def finish(self, unit: Unit) -> None:
        """Record a unit in the journal once all of it is written."""
        digest = self._hashing.submit(self._hash.hexdigest)
        self._last = self._writing.submit(self._record, unit.name, digest, self._last)
        self._waiting.append((0, digest, self._last))

    def _record(self, unit: str, digest: Future[str], previous: Future[None] | None) -> None:
        if previous:
            previous.result()
        self._journal.record(unit, digest.result())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        try:
            if kind is None:
                while self._waiting:
                    self._wait_for_oldest()
        finally:
            self._hashing.shutdown(cancel_futures=True)
            self._writing.shutdown(cancel_futures=True)
            self._file.close()
        if kind is None:
            self.sha256 = self._hash.hexdigest()
            self._partial.rename(self._final)


def _extend(running: Any, file: BinaryIO, count: int) -> bool:
    while count:
        block = file.read(min(count, _READ_BLOCK))
        if not block:
            return False
        running.update(block)
        count -= len(block)
    return True


def _header(shard: Shard) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for unit in shard.units:
        for entry in unit.entries:
            if position % ITEM_SIZE[entry.spec.dtype]:
                raise CheckpointError(
                    f"{entry.name} ({entry.spec.dtype}) would not be aligned in {shard.file}",
                    hint="write all tensors in one dtype: --dtype bfloat16",
                )
            end = position + entry.spec.nbytes
            entries[entry.name] = {
                "dtype": CODES[entry.spec.dtype],
                "shape": list(entry.spec.shape),
                "data_offsets": [position, end],
            }
            position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_index(folder: Path, shards: Iterable[Shard]) -> None:
    """Write ``model.safetensors.index.json``.

    A single shard gets an index, too: without one, vLLM and SGLang take every ``*.safetensors`` in the folder for weights, even
    the blueprint.
    """
    every = list(shards)
    names = {entry.name: shard.file for shard in every for unit in shard.units for entry in unit.entries}
    index = {
        "metadata": {"total_size": sum(shard.nbytes for shard in every)},
        "weight_map": dict(sorted(names.items())),
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
