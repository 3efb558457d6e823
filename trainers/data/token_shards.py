"""Shards of token ids on disk: tokenised once, by the rank that needs them first, then mapped into memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from upcycle.errors import EnvironmentFault, UsageError
from upcycle.files.atomic_files import write_whole
from upcycle.files.formats.parsing import parse_json
from upcycle.files.output.locks import one_at_a_time
from upcycle.text.reading.conversations import Broken, TextOrExample, content_of, is_blank
from upcycle.text.windows import Frame
from upcycle.trainers.data.corpus import Corpus
from upcycle.trainers.data.file_checks import NOTHING, FileCheck, refused_row
from upcycle.trainers.data.packing import Int64
from upcycle.trainers.pictures.pictures import Picture

_FORMAT = "1"  # part of every key: raise it, and older shards are not read
_TOGETHER = 1 << 19  # characters that are tokenised in one call

Int32 = NDArray[np.int32]
Hashes = NDArray[np.uint64]


class PicturedCodes(list[int]):
    """The codes of a document with images."""

    def __init__(self, codes: Sequence[int], pictures: tuple[Picture, ...]) -> None:
        super().__init__(codes)
        self.pictures = pictures


@dataclass(frozen=True)
class TokenShard:
    """A shard of tokenised documents, one after another. N documents, T tokens."""

    tokens: Int32  # [T], mapped from the file; coded as token_codes.py says
    lengths: Int64  # [N]
    hashes: Hashes  # [N], of the documents' texts
    digest: str  # of ids and lengths
    last: bool  # whether it is the last one of a stream
    check: FileCheck = NOTHING  # of examples: how many were kept, had no answer to learn, or could not be encoded
    pictures: tuple[tuple[Picture, ...], ...] = ()  # of each document; empty where none has any
    lost: tuple[str, ...] = ()  # images that could not be read, whose documents were left out
    made: int = 0  # when, in nanoseconds

    def pictures_at(self, begin: Int64) -> list[tuple[Picture, ...]]:
        """The images of the documents with tokens at ``begin`` ``[n]``."""
        starts = np.cumsum(self.lengths) - self.lengths
        return [self.pictures[place] for place in np.searchsorted(starts, begin, side="right") - 1]


class Encoder:
    """Turns documents into token ids, with the tokens that open and close them."""

    def __init__(self, tokenizer: Any, end_of_text: bool = True, frame: Frame | None = None) -> None:
        """A document begins with a beginning-of-text token if the tokenizer itself puts one there.

        Args:
            tokenizer: the model's.
            end_of_text: whether to close every document with the end-of-text token.
            frame: the tokens around every document instead, as encoders have them.

        Raises:
            UsageError: the tokenizer has no end-of-text token.
        """
        self._tokenizer = tokenizer
        with_special = tokenizer("a", verbose=False)["input_ids"]
        begin = tokenizer.bos_token_id
        self._head = [begin] if begin is not None and with_special[:1] == [begin] else []
        self._tail = [tokenizer.eos_token_id] if end_of_text else []
        if self._tail == [None] and frame is None:
            raise UsageError("the tokenizer has no end-of-text token", hint="set end_of_text: false in the data")
        if frame is not None:
            self._head, self._tail = list(frame.before), list(frame.behind)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        content = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
        self.fingerprint = hashlib.sha256(repr((_FORMAT, content, self._head, self._tail)).encode()).hexdigest()[:16]

    def encode(self, documents: Sequence[TextOrExample]) -> list[list[int] | Broken]:
        """Ids of each document, none where nothing of it is learned, or why it cannot be trained on."""
        ids = self._tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]
        return [[*self._head, *row, *self._tail] for row in ids]


class TokenCache:
    """A folder of shards. The index of a shard is written last, so that a killed run leaves none that looks complete."""

    def __init__(self, folder: Path, encoder: Encoder) -> None:
        self._folder, self.encoder = folder, encoder

    def shard(self, corpus: Corpus, number: int, holds: Callable[[TokenShard], bool] = lambda _: True) -> TokenShard:
        """A shard of ``corpus``: from the cache, or tokenised now, or as soon as another process has tokenised it.

        Args:
            corpus: the documents.
            number: of the shard.
            holds: whether a kept shard is still right, where more than its documents decides that.

        Raises:
            UpcycleError: the documents cannot be read, or the cache cannot be written.
        """
        key = hashlib.sha256(f"{self.encoder.fingerprint} {corpus.key(number)}".encode()).hexdigest()[:32]
        stem = self._folder / key[:2] / key
        found = _read(stem)
        if found and holds(found):
            return found
        try:
            stem.parent.mkdir(parents=True, exist_ok=True)
            with one_at_a_time(stem.with_suffix(".lock")):
                kept = _read(stem)
                if not (kept and holds(kept)):
                    with corpus.lock:
                        self._write(corpus, number, stem)
        except OSError as error:
            raise EnvironmentFault(
                f"tokenised text cannot be kept in {self._folder}: {error.strerror or error}",
                hint="set cache: FOLDER in the data, on a disk with room",
            ) from None
        found = _read(stem)
        if not found:
            raise EnvironmentFault(
                f"tokenised text has vanished from {self._folder}",
                hint="check whether another program cleans this folder",
            )
        return found

    def _write(self, corpus: Corpus, number: int, stem: Path) -> None:
        # Where files cannot be locked, two processes may write the same shard: each fills files of its own.
        index: list[bytes] = []
        write_whole(stem.with_suffix(".tokens"), lambda path: index.append(self._tokenise(corpus, number, path)))
        write_whole(stem.with_suffix(".safetensors"), lambda path: path.write_bytes(index[0]))

    def _tokenise(self, corpus: Corpus, number: int, path: Path) -> bytes:
        """Write the tokens of a shard to a file; returns the content of its index."""
        lengths: list[int] = []
        hashes: list[int] = []
        pictures: list[tuple[Picture, ...]] = []
        lost: list[str] = []
        check = FileCheck()
        digest, read = hashlib.sha256(), 0
        with path.open("wb") as file:
            for batch in _batches(corpus.documents(number)):
                read += len(batch)
                documents = [document for document in batch if not is_blank(document)]
                encoded = zip(documents, self.encoder.encode(documents) if documents else [], strict=True)
                rows: list[list[int]] = []
                for document, row in encoded:
                    if isinstance(row, Broken):
                        check += refused_row(row, corpus.reading.broken)
                        lost += [row.image] if row.image else []
                    elif row:
                        rows.append(row)
                        pictures.append(row.pictures if isinstance(row, PicturedCodes) else ())
                        hashes.append(document_hash(content_of(document)))
                    else:
                        check += FileCheck(empty=1)
                lengths += map(len, rows)
                block = np.fromiter(chain.from_iterable(rows), np.int32)
                digest.update(block.data)
                file.write(block.data)
        counts = np.array(lengths, np.int64)
        digest.update(counts.data)
        check += FileCheck(documents=len(lengths))
        facts = {
            "digest": digest.hexdigest()[:16],
            "last": str(not corpus.full(read)),
            "check": json.dumps(vars(check)),
        }
        if any(pictures):
            facts["pictures"] = json.dumps(pictures)
            check_digest = hashlib.sha256(f"{facts['digest']} {facts['pictures']}".encode())
            facts["digest"] = check_digest.hexdigest()[:16]
        if lost:
            facts["lost"] = json.dumps(lost)
        return save({"lengths": counts, "hashes": np.array(hashes, np.uint64)}, metadata=facts)


def document_hash(text: str) -> int:
    """A 64-bit hash of a document's text."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _read(stem: Path) -> TokenShard | None:
    """The shard in two files, or ``None`` if they are not both complete."""
    index, ids = stem.with_suffix(".safetensors"), stem.with_suffix(".tokens")
    try:
        with safe_open(index, framework="numpy") as file:
            lengths, hashes, facts = file.get_tensor("lengths"), file.get_tensor("hashes"), file.metadata()
        total = int(lengths.sum())
        if ids.stat().st_size != 4 * total:
            return None
        made = index.stat().st_mtime_ns
    except (FileNotFoundError, SafetensorError):
        return None
    tokens = np.memmap(ids, np.int32, "r") if total else np.empty(0, np.int32)
    check = FileCheck(**parse_json(facts["check"], str(index))) if "check" in facts else NOTHING
    listed = parse_json(facts["pictures"], str(index)) if "pictures" in facts else []
    pictures = tuple(tuple(Picture(*each) for each in row) for row in listed)
    lost = tuple(parse_json(facts["lost"], str(index))) if "lost" in facts else ()
    return TokenShard(tokens, lengths, hashes, facts["digest"], facts["last"] == "True", check, pictures, lost, made)


def _batches(documents: Iterator[TextOrExample]) -> Iterator[list[TextOrExample]]:
    """Documents in groups of about ``_TOGETHER`` characters."""
    batch: list[TextOrExample] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(content_of(document))
        if size >= _TOGETHER:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
