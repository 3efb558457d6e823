"""Checks all data before the first step: every row is read, and every example rendered and tokenised."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np

from upcycle.errors import UsageError
from upcycle.formatting import size
from upcycle.text.windows import frame_of
from upcycle.trainers.data.corpus import Corpus
from upcycle.trainers.data.file_checks import FileCheck
from upcycle.trainers.data.open_domain import (
    open_domain,
    open_domain_validation,
    token_cache,
    token_cache_folder,
    too_long_rule,
)
from upcycle.trainers.data.token_shards import TokenCache, TokenShard
from upcycle.trainers.data.too_long import fitted
from upcycle.trainers.pictures.pictures import Pictures
from upcycle.trainers.recipe.data_recipe import DataRecipe, DomainRecipe, TooLong

_LONG_CHECK = 1 << 30  # bytes, about ten seconds' worth: longer checks are announced
_LONG_EXAMPLES = 4 << 20  # the same for examples, which are rendered and tokenised
# What a row lacks that is left out as empty, by what rows are.
_LACKING = {"text": "text", "chat": "messages", "pairs": "a response", "preferences": "answers"}


def check_data(
    data: DataRecipe,
    tokenizer: Any,
    length: int,
    say: Callable[[str], None],
    turn: int = 0,
    masks: bool = False,
    pictures: Pictures | None = None,
    key: str = "data",
) -> list[str]:
    """Read every row of every file before training begins, and report what is read and what is left out.

    Examples are also rendered and tokenised, and so is text that is not simply split into rows. All results are kept in the cache,
    so that other ranks and later runs need not do it again.

    Args:
        data: the recipe's.
        tokenizer: the model's.
        length: tokens per row.
        say: called with lines and warnings about what was found.
        turn: this rank's number: ranks begin with different parts, and share the work.
        masks: whether the model is a masked language model.
        pictures: what it reads of images; ``None``: it reads none.
        key: where ``data`` stands in the recipe, for messages.

    Returns:
        The domains of preferences.

    Raises:
        UpcycleError: a file cannot be read, is not text, has a broken row and ``broken_lines`` is ``stop``, or a domain has nothing to
            learn.
    """
    started = time.perf_counter()
    read = 0
    preferences = []
    frame = frame_of(tokenizer) if masks else None
    for domain in data.domains:
        trained = open_domain(data, domain, pictures)
        held_out = open_domain_validation(data, domain, trained, pictures)
        corpora = [corpus for corpus in (trained, held_out) if corpus]
        preferences += [domain.name] if trained.kind == "preferences" else []
        weight = sum(corpus.weight for corpus in corpora)
        read += weight
        if weight > (_LONG_CHECK if corpora[0].kind == "text" else _LONG_EXAMPLES):
            more = "" if corpora[0].kind == "text" else ", and tokenising every example"
            say(f"domain {domain.name}: checking every row of {size(weight)}{more}, once")
        for corpus in corpora:
            found = corpus.check(token_cache_folder(data))
            if corpus is corpora[0] and found.documents:
                _say_columns(domain.name, corpus, found.documents, say)
            _say_left_out(domain.name, found, _LACKING[corpus.kind], say)
            rule = too_long_rule(domain, corpus)
            if corpus.shards is not None and (corpus.kind != "text" or rule != "split"):
                cache = token_cache(data, domain, corpus, tokenizer, frame, pictures, key)
                _check_examples(domain, corpus, cache, rule, length, say, turn, pictures)
    seconds = time.perf_counter() - started
    if read:
        say(f"checked every row of {size(read)} in {seconds:.1f} s; what is unchanged is not checked again")
    return preferences


def _say_columns(domain: str, corpus: Corpus, documents: int, say: Callable[[str], None]) -> None:
    reading = corpus.reading
    if corpus.kind == "pairs":
        what = f"pairs of '{', '.join(reading.prompt)}' and '{reading.response}'"
    elif corpus.kind == "preferences":
        what = f"preferences of '{reading.response}' over '{reading.rejected}'"
    elif reading.column is None:
        return
    else:
        what = f"rows, whose {'conversation' if corpus.kind == 'chat' else 'text'} is in column '{reading.column}'"
    say(f"domain {domain}: {documents:,} {what}")


def _say_left_out(domain: str, found: FileCheck, lacking: str, say: Callable[[str], None]) -> None:
    if found.empty:
        say(f"warning: domain {domain}: {found.empty:,} rows without {lacking} are left out")
    if found.broken:
        say(
            f"warning: domain {domain}: {found.broken:,} rows that cannot be read are left out, "
            f"such as {'; '.join(found.first)}"
        )


def _check_examples(
    domain: DomainRecipe,
    corpus: Corpus,
    cache: TokenCache,
    rule: TooLong,
    length: int,
    say: Callable[[str], None],
    turn: int,
    pictures: Pictures | None,
) -> None:
    """Tokenise all documents, and say how many are cut or left out, and why.

    Raises:
        UsageError: none is left.
    """
    assert corpus.shards is not None

    def holds(shard: TokenShard) -> bool:
        return pictures is None or pictures.as_they_were(chain(*shard.pictures), shard.lost, shard.made)

    order = [(turn + number) % corpus.shards for number in range(corpus.shards)]
    found = FileCheck()
    shown = 0
    cut = dropped = emptied = kept = 0
    for number in order:
        shard = cache.shard(corpus, number, holds)
        found += shard.check
        shown += sum(map(len, shard.pictures))
        begin = np.cumsum(shard.lengths) - shard.lengths
        fit = fitted([shard], np.zeros(len(begin), np.int64), begin, shard.lengths, length, rule)
        kept += len(fit.kept)
        cut, dropped, emptied = cut + fit.cut, dropped + fit.dropped, emptied + fit.emptied
    _say_left_out(domain.name, found, "an answer to learn", say)
    if shown:
        say(f"domain {domain.name}: {shown:,} images, whose headers were read")
    lost = {"keep_start": "their end", "keep_end": "their beginning"}.get(rule, "")
    if cut:
        say(
            f"warning: domain {domain.name}: {cut:,} documents longer than {length:,} tokens lose {lost} (too_long: {rule})"
        )
    if dropped:
        say(
            f"warning: domain {domain.name}: {dropped:,} documents longer than {length:,} tokens are left out "
            f"({'too_long: drop' if rule == 'drop' else 'they have images, which are not cut'})"
        )
    if emptied:
        say(
            f"warning: domain {domain.name}: {emptied:,} documents have nothing to learn in the {length:,} tokens that are kept of "
            "them, and are left out"
        )
    if not kept:
        reasons = [f"{number:,} {why}" for number, why in (
            (found.empty, "have no answer"), (found.broken, "cannot be read"), (dropped, "are too long"),
            (emptied, f"have no answer within {length:,} tokens"),
        ) if number]  # fmt: skip
        raise UsageError(
            f"domain '{domain.name}': nothing is left to train on: {', '.join(reasons) or 'it has no example'}",
            hint="check its columns, roles and chat template (upcycle train RECIPE --show 3), or raise length",
        )
