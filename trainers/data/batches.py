"""The stream of training batches, and the fixed validation batches. B rows of L positions on each rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from upcycle.errors import EnvironmentFault, UsageError
from upcycle.files import user_paths
from upcycle.files.user_paths import user_path
from upcycle.recipe.conversion_recipe import parse_size
from upcycle.trainers.data.corpus import Corpus, open_corpus
from upcycle.trainers.data.domain_mixture import Mixture
from upcycle.trainers.data.domain_rows import SHARDS_TOGETHER, Cursor, DomainRows
from upcycle.trainers.data.masking import Masker
from upcycle.trainers.data.packing import PackedRow
from upcycle.trainers.data.token_shards import Encoder, TokenCache
from upcycle.trainers.data.validation_rows import held_out_documents, validation_rows
from upcycle.trainers.recipe.data_recipe import DataRecipe, DomainRecipe, MaskingRecipe

_VERSION = 1  # of the order of rows: a checkpoint of another one cannot be continued
_LONG_CHECK = 1 << 30  # bytes, about ten seconds' worth: longer checks are announced


@dataclass(frozen=True)
class PackedBatch:
    """Rows of token ids, each of which holds one or more documents or parts of them.

    :func:`upcycle.trainers.data.packed_attention.packed_forward` runs a model on it so that documents do not see each other.

    ``ids`` int64 ``[B, L]``; ``mask`` bool ``[B, L]``, the tokens that are targets: no padding, and not the first token of a
    document or part; ``positions`` int64 ``[B, L]``, 0 at the first token of a document or part and nowhere else; ``domains``
    the domain of each row.

    For a masked language model, ``mask`` are the tokens that it predicts at their own places, ``given`` int64 ``[B, L]`` is what it
    reads, and ``text`` bool ``[B, L]`` says what is no padding.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    domains: tuple[str, ...]
    given: torch.Tensor | None = None
    text: torch.Tensor | None = None

    @property
    def real(self) -> torch.Tensor:
        """Bool ``[B, L]``: all tokens that are not padding, whether or not they are targets."""
        return self.mask | (self.positions == 0) if self.text is None else self.text

    def predicting(self, logits: torch.Tensor) -> torch.Tensor:
        """Of logits ``[B, L, V]``, those ``[B, L - 1, V]`` that predict the tokens at positions 1 and on."""
        return logits[:, :-1] if self.given is None else logits[:, 1:]

    def flat(self) -> PackedBatch:
        """The same documents in one long row ``[1, B L]``, with the same losses: flash attention needs this."""
        return self.changed(lambda part: part.reshape(1, -1))

    def masked(self, masker: Masker, rows: Sequence[object]) -> PackedBatch:
        """The same batch for a masked language model; ``rows`` are what each row's choice depends on beside the seed."""
        given, chosen = masker(self.ids, self.real, rows)
        return replace(self, mask=chosen, given=given, text=self.real)

    def changed(self, how: Callable[[torch.Tensor], torch.Tensor]) -> PackedBatch:
        """The same batch, with something done to each of its tensors."""
        parts: dict[str, Any] = {name: how(part) for name, part in vars(self).items() if isinstance(part, torch.Tensor)}
        return replace(self, **parts)


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
    ) -> None:
        self._domains = {domain.name: domain for domain in sorted(domains, key=lambda domain: domain.name)}
        self._mixture, self._facts = mixture, facts
        self._micro_batch, self._rank, self._world_size = micro_batch, rank, world_size
        self._masker = masker
        self._row = 0
        self._cursors = {name: domain.skip(Cursor(), 0) for name, domain in self._domains.items()}

    @property
    def weights(self) -> dict[str, float]:
        """The present share of each domain; all sum to 1."""
        return dict(self._mixture.weights)

    @property
    def rows(self) -> int:
        """How many rows all ranks together have taken."""
        return self._row

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
        batch = make_batch([rows[place] for place in range(len(mine))], [names[number] for number in mine])
        return batch.masked(self._masker, range(first, first + len(mine))) if self._masker else batch

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
                    hint="check its column, separator and validation, and whether something wrote to its files",
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

    Raises:
        UpcycleError: a domain cannot be read or is empty.
    """
    masker = _masker(data, tokenizer, seed) if masks else None
    encoder = _encoder(data, tokenizer, masker)
    cache = TokenCache(token_cache_folder(data), encoder)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    domains = []
    for domain in data.domains:
        corpus = _corpus(data, domain)
        held_out = held_out_documents(
            domain.name, corpus, _validation_corpus(data, domain), cache, data.validation.fraction
        )
        domains.append(
            DomainRows(
                domain.name, corpus, cache, held_out,
                length=length, packing=data.packing, padding=padding, seed=seed, turn=rank,
            )
        )  # fmt: skip
    facts = {
        "tokenizer": encoder.fingerprint,
        "length": length,
        "seed": seed,
        "packing": data.packing,
        "shuffle": parse_size(data.shuffle),
        "validation": data.validation.fraction,
        "weights": data.weights,
        "dynamic": data.dynamic.model_dump() if data.dynamic else None,
    }
    if masker:
        facts["masking"] = (data.masking or MaskingRecipe()).model_dump()
    mixture = Mixture(data.weights, data.dynamic, seed)
    return TokenStream(domains, mixture, facts, micro_batch, rank, world_size, masker)


def _masker(data: DataRecipe, tokenizer: Any, seed: int) -> Masker:
    return Masker(data.masking or MaskingRecipe(), tokenizer, seed)


def _encoder(data: DataRecipe, tokenizer: Any, masker: Masker | None) -> Encoder:
    """What turns documents into ids: for a masked language model with the special tokens that it has seen around texts."""
    return Encoder(tokenizer, data.end_of_text, masker.frame if masker else None)


def open_validation(
    data: DataRecipe, tokenizer: Any, *, length: int, masks: bool = False
) -> dict[str, list[PackedBatch]]:
    """Batches of each domain's held-out documents, in the recipe's order of domains; the same for every seed.

    With ``masks``, for a masked language model, what is masked is the same for every seed, too.

    If ``validation.fraction`` is 0, only domains with validation files of their own have batches.

    Raises:
        UsageError: a fraction is to be held out, but no document falls into it.
    """
    masker = _masker(data, tokenizer, 0) if masks else None
    cache = TokenCache(token_cache_folder(data), _encoder(data, tokenizer, masker))
    found: dict[str, list[PackedBatch]] = {}
    for domain in data.domains:
        files = _validation_corpus(data, domain)
        if not files and not data.validation.fraction:
            continue
        corpus = files or _corpus(data, domain)
        held_out = None if files else held_out_documents(domain.name, corpus, None, cache, data.validation.fraction)
        rows = validation_rows(domain.name, corpus, cache, held_out, data.validation.tokens, length)
        size = data.validation.batch
        found[domain.name] = []
        for at in range(0, len(rows), size):
            part = rows[at : at + size]
            batch = make_batch(part, [domain.name] * len(part))
            keys = [("validation", domain.name, at + row) for row in range(len(part))]
            found[domain.name].append(batch.masked(masker, keys) if masker else batch)
    return found


def make_batch(rows: list[PackedRow], domains: list[str]) -> PackedBatch:
    """A batch of rows, of which each is ids, positions and targets ``[L]``; ``domains`` has one name per row."""
    ids, positions, targets = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
    return PackedBatch(ids, targets, positions, tuple(domains))


def token_cache_folder(data: DataRecipe) -> Path:
    """The folder in which tokenised text is kept.

    Raises:
        EnvironmentFault: the recipe names none, and this user has no cache folder that can be written.
    """
    if data.cache:
        return user_path(data.cache)
    cache = user_paths.cache_folder()
    if cache is None:
        raise EnvironmentFault(
            "there is no folder for tokenised text: neither ~/.cache nor the one for temporary files can be written",
            hint="set cache: FOLDER in the data, or XDG_CACHE_HOME in the environment",
        )
    return cache / "tokens"


def check_data(data: DataRecipe, say: Callable[[str], None]) -> None:
    """Read every row of every file before training begins, and report which column each domain's text is in.

    The result is kept in the cache, so that other ranks and later runs need not read the files again.

    Args:
        data: the recipe's.
        say: called with lines and warnings about what was found.

    Raises:
        UpcycleError: a file cannot be read, is not text, or has a broken row and ``broken_lines`` is ``stop``.
    """
    for domain in data.domains:
        corpora = [corpus for corpus in (_corpus(data, domain), _validation_corpus(data, domain)) if corpus]
        weight = sum(corpus.weight for corpus in corpora)
        if weight > _LONG_CHECK:
            say(f"domain {domain.name}: checking every row of {weight / 1e9:.1f} GB, once")
        checks = [corpus.check(token_cache_folder(data)) for corpus in corpora]
        if corpora[0].column is not None and checks[0].documents:
            say(f"domain {domain.name}: {checks[0].documents:,} rows, whose text is in column '{corpora[0].column}'")
        for found in checks:
            if found.empty:
                say(f"warning: domain {domain.name}: {found.empty:,} rows without text are left out")
            if found.broken:
                say(
                    f"warning: domain {domain.name}: {found.broken:,} rows that cannot be read are left out, "
                    f"such as {'; '.join(found.first)}"
                )


def _corpus(data: DataRecipe, domain: DomainRecipe) -> Corpus:
    return _open(data, domain, domain.text, domain.revision)


def _validation_corpus(data: DataRecipe, domain: DomainRecipe) -> Corpus | None:
    return None if domain.validation is None else _open(data, domain, domain.validation, None)


def _open(data: DataRecipe, domain: DomainRecipe, texts: list[str], revision: str | None) -> Corpus:
    size = max(1, parse_size(data.shuffle) // SHARDS_TOGETHER)
    return open_corpus(
        texts, domain.column, domain.separator, revision, size, domain.name, data.broken_lines, domain.format
    )


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
