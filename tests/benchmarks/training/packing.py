"""How full packed rows are, how many documents they cut, and what a batch costs.

Text: the standard library's sources (code) and its documentation (prose) as this Python has them, tokenised by the embedded
demo model's tokenizer. For each way of packing and row length, one epoch of each domain: positions that hold a token, positions
that are a target (the first token of a document, or of a part of one, has nothing to be predicted from), documents that are
cut although a row could hold them whole, and the time to pack. Then the time of ``next_batch`` for a micro-batch of 8, rows
of 1,024, both domains mixed, tokenised before, on rank 0 of 1 and of 64.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

from upcycle.architectures.stock import load_tokenizer
from upcycle.files.locate import DEMO_FOLDER
from upcycle.text.reading.columns import Reading
from upcycle.trainers.data.batches import open_stream
from upcycle.trainers.data.corpus import LocalCorpus
from upcycle.trainers.data.keyed_random import permutation
from upcycle.trainers.data.packing import Int64, pack_documents
from upcycle.trainers.data.token_shards import Encoder, TokenCache
from upcycle.trainers.demo.demo_text import documents
from upcycle.trainers.recipe.data_recipe import DataRecipe, Packing

LEAST_FILLED = 0.98
LENGTHS = (256, 512, 1024, 2048, 4096)
WAYS: tuple[Packing, ...] = ("best_fit", "concatenate", "alone")


def main() -> int:
    """Measure and print; 1 where rows of best_fit or concatenate are filled to less than 98%."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    tokenizer = load_tokenizer(DEMO_FOLDER / "model")
    with tempfile.TemporaryDirectory() as folder:
        files = write_texts(Path(folder))
        cache = TokenCache(Path(folder) / "cache", Encoder(tokenizer))
        started = time.perf_counter()
        lengths = {name: tokenised(path, cache) for name, path in files.items()}
        seconds = time.perf_counter() - started
        tokens = sum(int(part.sum()) for part in lengths.values())
        print(f"tokenised {tokens:,} tokens in {seconds:.1f} s ({tokens / seconds:,.0f} tokens/s)\n")
        print("domain  packing      row   filled   targets  cut    padding rows   pack")
        missed = [line for name, part in lengths.items() for line in packed(name, part)]
        data = DataRecipe.model_validate({"domains": files, "cache": str(Path(folder) / "cache"), "shuffle": "1GB"})
        print()
        for world in (1, 64):
            stream = open_stream(data, tokenizer, length=1024, micro_batch=8, rank=0, world_size=world, seed=0)
            print(
                f"next_batch, rank 0 of {world:2}: {1000 * median(timed(stream.next_batch) for _ in range(100)):.2f} ms"
            )
    if missed:
        print("missed: filled to less than 98%: " + ", ".join(missed), file=sys.stderr)
    return bool(missed)


def write_texts(folder: Path) -> dict[str, str]:
    """One .jsonl file of documents for each domain."""
    files = {name: folder / f"{name}.jsonl" for name in ("code", "prose")}
    handles = {name: path.open("w") for name, path in files.items()}
    for document in documents():
        handles[document.domain].write(json.dumps({"text": document.text}) + "\n")
    for handle in handles.values():
        handle.close()
    return {name: str(path) for name, path in files.items()}


def tokenised(path: str, cache: TokenCache) -> Int64:
    """Lengths of all documents, shuffled as they would be."""
    corpus = LocalCorpus([path], Reading(), 1 << 30)
    lengths = np.concatenate([cache.shard(corpus, shard).lengths for shard in range(corpus.shards or 0)])
    return lengths[permutation(len(lengths), 0)]


def packed(name: str, lengths: Int64) -> list[str]:
    """Print a line for each way and length; those that miss the target."""
    missed = []
    for how in WAYS:
        for row in LENGTHS:
            seconds = timed(lambda how=how, row=row: pack_documents(lengths, row, how))
            rows = pack_documents(lengths, row, how)
            positions = len(rows) * row
            filled = int(rows.length.sum()) / positions
            targets = (int(rows.length.sum()) - len(rows.length)) / positions
            parts = np.bincount(rows.document, minlength=len(lengths))
            cut = int(((parts > 1) & (lengths <= row)).sum()) / len(lengths)
            print(
                f"{name:7} {how:12} {row:4}  {filled:7.2%}  {targets:7.2%}  {cut:5.1%}  "
                f"{len(rows) - int(rows.length.sum()) / row:8.1f} of {len(rows):5,}  {seconds * 1000:6.1f} ms"
            )
            if how != "alone" and filled < LEAST_FILLED:
                missed.append(f"{name} {how} {row}")
    return missed


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
