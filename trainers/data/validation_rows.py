"""The held-out documents of a domain, and the rows they are packed into, in the order of the corpus."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count

import numpy as np

from upcycle.errors import UsageError
from upcycle.trainers.data.corpus import Corpus
from upcycle.trainers.data.domain_rows import SHARDS_TOGETHER, HeldOut, read_row
from upcycle.trainers.data.packing import Int64, PackedRow, pack_documents
from upcycle.trainers.data.token_shards import Hashes, TokenCache, TokenShard
from upcycle.trainers.data.too_long import fitted
from upcycle.trainers.recipe.data_recipe import Packing, TooLong

_NO_HASHES = np.empty(0, np.uint64)


def held_out_hashes(corpus: Corpus | None, cache: TokenCache) -> Hashes:
    """Hashes ``[N]`` of all documents of a corpus; empty for ``None``.

    Raises:
        UpcycleError: it cannot be read.
    """
    if corpus is None:
        return _NO_HASHES
    return np.concatenate([_NO_HASHES, *(shard.hashes for shard in _shards(corpus, cache))])


def held_out_documents(
    domain: str, corpus: Corpus, files: Corpus | None, cache: TokenCache, fraction: float
) -> HeldOut:
    """Which documents of a domain are held out: those of ``files``, or else a fraction of all, chosen by their hash.

    A corpus that fits into one block has at least one document held out, the one with the smallest hash, and at least one to
    train on, the one with the largest hash. Where it is one document of text, that fraction of its tokens is held out: the last.

    Args:
        domain: what errors call it.
        corpus: its documents.
        files: the documents of its validation files, if it has any.
        cache: where tokenised text is kept.
        fraction: the share of the documents to hold out.

    Raises:
        UsageError: the corpus is a single conversation or pair.
        UpcycleError: it cannot be read.
    """
    if files is not None:
        return HeldOut(0.0, held_out_hashes(files, cache))
    held_out = HeldOut(fraction, _NO_HASHES)
    if not fraction or corpus.shards is None or corpus.shards > SHARDS_TOGETHER:
        return held_out
    hashes = np.unique(held_out_hashes(corpus, cache))
    if len(hashes) == 1:
        if corpus.kind == "text":
            return HeldOut(0.0, _NO_HASHES, ends=fraction)
        raise UsageError(
            f"domain '{domain}' is one example, which cannot be both trained on and held out",
            hint="give it files to validate on (validation: [FILE]), or set validation: {fraction: 0}",
        )
    chosen = held_out.chosen(hashes)
    if len(hashes) and not chosen.any():
        return replace(held_out, hashes=hashes[:1])
    if len(hashes) and chosen.all():
        return replace(held_out, kept=hashes[-1:])
    return held_out


def validation_rows(
    domain: str,
    corpus: Corpus,
    cache: TokenCache,
    held_out: HeldOut | None,
    tokens: int,
    length: int,
    too_long: TooLong = "split",
    packing: Packing = "best_fit",
) -> list[PackedRow]:
    """Rows of a domain's first ``tokens`` held-out tokens, of which some may be padded.

    Text is cut at the end of rows. Examples stay whole, and so do documents under another rule than ``split``: the one in which
    the tokens are enough is the last.

    Args:
        domain: what errors call it.
        corpus: its documents.
        cache: where tokenised text is kept.
        held_out: which of them are held out; ``None``: all.
        tokens: how many to take, at most.
        length: tokens per row.
        too_long: what becomes of documents longer than a row.
        packing: that of training: with ``alone``, every document has rows for itself here, too.

    Raises:
        UsageError: no document is held out.
    """
    shards: list[TokenShard] = []
    chosen, begins, lengths = [], [], []
    have = documents = lost = 0
    for shard in _shards(corpus, cache):
        of_shard, begin, size = held_out.parts(shard, held_out=True) if held_out else _whole(shard)
        documents += len(shard.hashes)
        fit = fitted([shard], np.zeros(len(of_shard), np.int64), begin, size, length, too_long)
        lost += fit.dropped + fit.emptied
        wanted = np.cumsum(fit.length) - fit.length < tokens - have
        have += int(fit.length[wanted].sum())
        chosen.append(np.full(int(wanted.sum()), len(shards)))
        begins.append(fit.begin[wanted])
        lengths.append(fit.length[wanted])
        shards.append(shard)
        if have >= tokens:
            break
    if not have and lost:
        raise UsageError(
            f"domain '{domain}': {lost} examples are held out, and none has an answer in a row of {length} tokens",
            hint="raise length, or choose another too_long in the domain",
        )
    if not have:
        share = f"falls into the held-out fraction {held_out.fraction:g}" if held_out else "has any text"
        raise UsageError(
            f"domain '{domain}' has {documents} documents, and none of them {share}",
            hint="raise validation.fraction, give it a separator that divides its files, or files to validate on: validation: [FILE]",
        )
    size = np.concatenate(lengths)
    if too_long == "split":
        last = tokens - int(size[:-1].sum())  # the last document is cut where the tokens are enough
        size[-1] = min(int(size[-1]), last)
    whole = too_long != "split" or corpus.kind != "text"
    rows = pack_documents(size, length, "alone" if packing == "alone" else "best_fit" if whole else "concatenate")
    return [
        read_row(shards, np.concatenate(chosen), np.concatenate(begins), rows, number, length, 0)
        for number in range(len(rows))
    ]


def _whole(shard: TokenShard) -> tuple[Int64, Int64, Int64]:
    return np.arange(len(shard.hashes)), np.cumsum(shard.lengths) - shard.lengths, shard.lengths


def _shards(corpus: Corpus, cache: TokenCache) -> Iterator[TokenShard]:
    for number in count():
        if number == corpus.shards:
            return
        shard = cache.shard(corpus, number)
        yield shard
        if shard.last:
            return
