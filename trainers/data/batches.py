"""The stream of training batches, and the fixed validation batches. B rows of L positions on each rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from upcycle.errors import UsageError
from upcycle.recipe.conversion_recipe import parse_size
from upcycle.trainers.data.domain_mixture import Mixture
from upcycle.trainers.data.domain_rows import Cursor, DomainRows
from upcycle.trainers.data.masking import Masker
from upcycle.trainers.data.open_domain import open_domain, open_domain_validation, token_cache, too_long_rule
from upcycle.trainers.data.packing import PackedBatch, PackedRow
from upcycle.trainers.data.token_shards import Encoder
from upcycle.trainers.data.validation_rows import held_out_documents, validation_rows
from upcycle.trainers.pictures.pictures import Pictures
from upcycle.trainers.pictures.row_pictures import BatchPictures
from upcycle.trainers.recipe.data_recipe import DataRecipe, MaskingRecipe

_VERSION = 1  # of the order of rows: a checkpoint of another one cannot be continued


class TokenStream:
    """One rank's part of the global stream of rows: each call takes this rank's B of the next ``world_size x B`` rows.

    The global order of rows depends only on recipe, tokenizer, length and seed. If ranks, micro-batch and accumulation change but
    their product does not, each optimizer step still sees the same rows.
    """

    def __init__(
        self,
        domains: list[DomainRows],
        mixture: Mixture,
        facts: dict[str, Any],
        micro_batch: int,
        rank: int,
        world_size: int,
        masker: Masker | None = None,
        pictures: Pictures | None = None,
    ) -> None:
        self._domains = {domain.name: domain for domain in sorted(domains, key=lambda domain: domain.name)}
        self._mixture, self._facts = mixture, facts
        self._micro_batch, self._rank, self._world_size = micro_batch, rank, world_size
        self._masker, self._pictures = masker, pictures
        self._row = 0
        self._preferences = {domain.name for domain in domains if domain.corpus.kind == "preferences"}
        self._cursors = {name: domain.skip(Cursor(), 0) for name, domain in self._domains.items()}

    @property
    def weights(self) -> dict[str, float]:
        """The present share of each domain; all sum to 1."""
        return dict(self._mixture.weights)

    @property
    def rows(self) -> int:
        """How many rows all ranks together have taken."""
        return self._row

    @property
    def passes(self) -> dict[str, tuple[int, bool]]:
        """How often each domain was read to its end, and whether a further pass was begun."""
        return {name: (at.epoch, (at.block, at.row) != (0, 0)) for name, at in self._cursors.items()}

    def observe(self, losses: Mapping[str, float]) -> dict[str, float]:
        """Update dynamic weights from each domain's validation loss (:meth:`Mixture.observe`); all ranks must do it together."""
        return self._mixture.observe(losses)

    @property
    def lacks_reference(self) -> bool:
        """Whether dynamic weights still need reference losses, through :meth:`refer_to`."""
        return self._mixture.dynamic is not None and self._mixture.reference is None

    def refer_to(self, losses: Mapping[str, float]) -> None:
        """Give dynamic weights the dense parent's losses as reference, as :meth:`Mixture.refer_to` does."""
        self._mixture.refer_to(losses)

    def next_batch(self) -> PackedBatch:
        """This rank's next B rows.

        Raises:
            UpcycleError: a file is gone, has changed, or cannot be read.
        """
        names = list(self._domains)
        drawn = self._mixture.draw(self._row, self._micro_batch * self._world_size)
        before, mine, after = np.split(drawn, [self._rank * self._micro_batch, (self._rank + 1) * self._micro_batch])
        rows: dict[int, PackedRow] = {}
        for number, name in enumerate(names):
            domain = self._domains[name]
            cursor = domain.skip(self._cursors[name], int((before == number).sum()))
            for place in np.flatnonzero(mine == number).tolist():
                rows[place] = domain.row(cursor)
                cursor = domain.skip(cursor, 1)
            self._cursors[name] = domain.skip(cursor, int((after == number).sum()))
        first = self._row + len(before)
        self._row += len(drawn)
        names_of = [names[number] for number in mine]
        batch = make_batch([rows[place] for place in range(len(mine))], names_of, self._pictures)
        if self._masker:
            return batch.masked(self._masker, range(first, first + len(mine)))
        return compared_batch(batch, [name in self._preferences for name in batch.domains])

    def state(self) -> dict[str, Any]:
        """The position in the global stream, as JSON; the same on every rank."""
        places = {
            name: {
                **asdict(cursor),
                "digest": self._domains[name].digest(cursor),
                "contents": self._domains[name].corpus.contents(),
            }
            for name, cursor in self._cursors.items()
        }
        return {
            "version": _VERSION,
            **self._facts,
            "rows": self._row,
            "mixture": self._mixture.state(),
            "domains": places,
        }

    def restore(self, state: Mapping[str, Any]) -> list[str]:
        """Continue from :meth:`state`, on any number of ranks.

        Files may have been mended since. If the current block holds the same documents, the position is exact; otherwise it is
        the same row number in that block. Later blocks are read as they are now.

        Returns:
            A sentence for every domain whose files have changed.

        Raises:
            UsageError: the data, the tokenizer or a setting that decides the order has changed.
        """
        places = state["domains"]
        if set(places) != set(self._domains):
            raise UsageError(f"data: the domains were {', '.join(places)} and are now {', '.join(self._domains)}")
        for key, now in {"version": _VERSION, **self._facts}.items():
            if state.get(key) != now:
                raise UsageError(
                    f"data: {key} was {state.get(key)!r} when the checkpoint was saved and is now {now!r}",
                    hint="restore its value, or start a new run from the checkpoint's weights",
                )
        notes = []
        for name, domain in self._domains.items():
            changed = _changed_files(name, places[name]["contents"], domain.corpus.contents())
            cursor = Cursor(*(int(places[name][key]) for key in ("epoch", "block", "row")))
            same = domain.digest(cursor) == places[name]["digest"]
            if changed:
                notes.append(_mended(name, changed, cursor, same))
            elif not same:
                raise UsageError(
                    f"domain '{name}': its documents have changed since the checkpoint was saved",
                    hint="check its column, separator and validation, whether something wrote to its files, and whether its images "
                    "are all there",
                )
            self._cursors[name] = cursor if same else domain.skip(Cursor(cursor.epoch, cursor.block), cursor.row)
        self._row = int(state["rows"])
        self._mixture.restore(state["mixture"])
        return notes


def open_stream(
    data: DataRecipe,
    tokenizer: Any,
    *,
    length: int,
    micro_batch: int,
    rank: int,
    world_size: int,
    seed: int,
    masks: bool = False,
    pictures: Pictures | None = None,
) -> TokenStream:
    """The training stream of ``data``, at its beginning.

    Args:
        data: the recipe's.
        tokenizer: the model's.
        length: L, tokens per row.
        micro_batch: B, rows per rank and pass.
        rank: this one's number.
        world_size: number of ranks.
        seed: of all random choices.
        masks: whether the model is a masked language model.
        pictures: what it reads of images; ``None``: it reads none.

    Raises:
        UpcycleError: a domain cannot be read or is empty.
    """
    masker = _masker(data, tokenizer, seed) if masks else None
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    domains = []
    examples = {}
    for domain in data.domains:
        corpus = open_domain(data, domain, pictures)
        cache = token_cache(data, domain, corpus, tokenizer, masker.frame if masker else None, pictures)
        if corpus.kind != "text":
            examples[domain.name] = cache.encoder.fingerprint
        files = open_domain_validation(data, domain, corpus, pictures)
        held_out = held_out_documents(domain.name, corpus, files, cache, data.validation.fraction)
        domains.append(
            DomainRows(
                domain.name, corpus, cache, held_out,
                length=length, packing=data.packing, padding=padding, seed=seed, turn=rank,
                too_long=too_long_rule(domain, corpus),
            )
        )  # fmt: skip
    facts = {
        "tokenizer": Encoder(tokenizer, data.end_of_text, masker.frame if masker else None).fingerprint,
        "length": length,
        "seed": seed,
        "packing": data.packing,
        "shuffle": parse_size(data.shuffle),
        "validation": data.validation.fraction,
        "weights": data.weights,
        "dynamic": data.dynamic.model_dump() if data.dynamic else None,
        "chat_template": examples or None,  # a fingerprint by domain; None, as if it were not there, where all is text
    }
    if masker:
        facts["masking"] = (data.masking or MaskingRecipe()).model_dump()
    mixture = Mixture(data.weights, data.dynamic, seed)
    shown = pictures if any(domain.corpus.pictured for domain in domains) else None
    return TokenStream(domains, mixture, facts, micro_batch, rank, world_size, masker, shown)


def _masker(data: DataRecipe, tokenizer: Any, seed: int) -> Masker:
    return Masker(data.masking or MaskingRecipe(), tokenizer, seed)


def open_validation(
    data: DataRecipe, tokenizer: Any, *, length: int, masks: bool = False, pictures: Pictures | None = None
) -> dict[str, list[PackedBatch]]:
    """Batches of each domain's held-out documents, in the recipe's order of domains; the same for every seed.

    Of preferences, the better answers are the targets. With ``masks``, for a masked language model, what is masked is the same for
    every seed, too.

    If ``validation.fraction`` is 0, only domains with validation files of their own have batches.

    Raises:
        UsageError: a fraction is to be held out, but no document falls into it.
    """
    masker = _masker(data, tokenizer, 0) if masks else None
    found: dict[str, list[PackedBatch]] = {}
    for domain in data.domains:
        trained = open_domain(data, domain, pictures)
        files = open_domain_validation(data, domain, trained, pictures)
        if not files and not data.validation.fraction:
            continue
        corpus = files or trained
        cache = token_cache(data, domain, corpus, tokenizer, masker.frame if masker else None, pictures)
        held_out = None if files else held_out_documents(domain.name, corpus, None, cache, data.validation.fraction)
        rule = too_long_rule(domain, corpus)
        rows = validation_rows(domain.name, corpus, cache, held_out, data.validation.tokens, length, rule, data.packing)
        size = data.validation.batch
        batches = []
        for at in range(0, len(rows), size):
            part = rows[at : at + size]
            batch = make_batch(part, [domain.name] * len(part), pictures if corpus.pictured else None)
            keys = [("validation", domain.name, at + row) for row in range(len(part))]
            batches.append(batch.masked(masker, keys) if masker else batch)
        found[domain.name] = [better_answers(batch) if corpus.kind == "preferences" else batch for batch in batches]
    return found


def make_batch(rows: list[PackedRow], domains: list[str], pictures: Pictures | None = None) -> PackedBatch:
    """A batch of rows; ``domains`` has one name per row, and ``pictures`` reads their images, if the data have any."""
    parts = zip(*(row[:4] for row in rows), strict=True)
    ids, positions, targets, unpadded = (torch.from_numpy(np.stack(part)) for part in parts)
    held = BatchPictures(pictures, tuple(row.pictures for row in rows)) if pictures else None
    return PackedBatch(ids, targets, positions, tuple(domains), unpadded, pictures=held)


def compared_batch(batch: PackedBatch, preferences: Sequence[bool]) -> PackedBatch:
    """The same batch, in which answers in rows of ``preferences`` are compared, and no targets."""
    if not any(preferences):
        return batch
    rows = torch.tensor(preferences)[:, None]
    return replace(batch, mask=batch.mask & ~rows, compared=batch.mask & rows)


def better_answers(batch: PackedBatch) -> PackedBatch:
    """A batch of preferences with the better answers as targets, by which it is validated."""
    number = (batch.positions == 0).cumsum(1) - 1
    return replace(batch, mask=batch.mask & (number % 2 == 0))


def _changed_files(domain: str, then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The files that have other contents now.

    Raises:
        UsageError: a file was removed or added, which would change the order of all that follows.
    """
    for path in {**then, **now}:
        if path not in then or path not in now:
            raise UsageError(
                f"domain '{domain}': {path} was {'removed' if path in then else 'added'} after the checkpoint was saved",
                hint="use the same files (their contents may be mended), or start a new run from the checkpoint's weights",
            )
    return [path for path in now if then[path] != now[path]]


def _mended(domain: str, changed: list[str], cursor: Cursor, same: bool) -> str:
    where = f"epoch {cursor.epoch}, block {cursor.block}, row {cursor.row}"
    kept = (
        f"the current block of text is unchanged, so the run continues at exactly the same position ({where})"
        if same
        else f"the current block of text has changed: the run continues at the same row number in it ({where}), and in this "
        "epoch some documents may be read twice or not at all"
    )
    return f"domain '{domain}': {', '.join(changed)} changed since the checkpoint was saved; {kept}"
