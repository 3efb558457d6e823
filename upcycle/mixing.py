"""Several fine-tunes of one model behind the interface of one checkpoint, read side by side."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.checkpoint import COPY_BLOCK_BYTES, DenseCheckpoint
from upcycle.families.origin import Origin
from upcycle.source_checks import check_sources
from upcycle.sources import is_local

if TYPE_CHECKING:
    import torch

    from upcycle.feed_forward import FeedForward
    from upcycle.recipe import Recipe


@dataclass(frozen=True)
class Mix:
    """What a mixing method is told of the sources.

    ``weights`` are the recipe's, one per source. ``alike`` says that all sources and the base hold the same numbers, so
    that a mix of them is the dense function; ``base`` is the index of the recipe's ``source`` among them, or their number.
    """

    weights: tuple[float, ...]
    alike: bool
    base: int

    @property
    def count(self) -> int:
        """How many sources there are."""
        return len(self.weights)


class MixedCheckpoint(DenseCheckpoint):
    """Several checkpoints of one shape. Configuration, tokenizer and :meth:`read` are the base's, which is the recipe's
    ``source``; matrices of experts are read from the source they belong to, and what is copied is an average.

    Args:
        base: the recipe's ``source``.
        members: the recipe's ``sources``.
        weights: theirs.
        dtype: the recipe's: where it is ``keep``, sources must agree on every tensor's.
        tokenizers: whether to compare tokenizers.

    Raises:
        UsageError: they do not belong together; names the sources, the key and both values.
    """

    def __init__(
        self,
        base: DenseCheckpoint,
        members: Sequence[DenseCheckpoint],
        weights: Sequence[float],
        dtype: str = "keep",
        tokenizers: bool = True,
    ) -> None:
        self.members: tuple[DenseCheckpoint, ...] = ()
        super().__init__(base.source)
        place = base.source.path.resolve()
        where = [i for i, member in enumerate(members) if member.source.path.resolve() == place]
        base_index = where[0] if where else len(members)
        self.members = (*members, members[where[0]] if where else base)
        check_sources(self.members, dtype, tokenizers)
        self.mix = Mix(tuple(weights), _alike(self.members), base_index)
        self.rest: tuple[float, ...] | None = None  # weights of what is no expert, one per member; None: the base's
        self._opened = self.modified
        together = "\n".join(member.fingerprint for member in self.members)
        self.fingerprint = hashlib.sha256(together.encode()).hexdigest()

    @property
    def paths(self) -> list[Path]:
        """A folder or file per source, and the base."""
        return [member.source.path for member in self.members]

    @property
    def modified(self) -> list[int]:
        """When each weight file of every source was last changed."""
        return [time for member in self.members for time in member.modified] if self.members else super().modified

    def blocks(self, origin: Origin, dtype: str = "keep") -> Iterator[torch.Tensor]:
        """A tensor of the converted model that is no expert's: the weighted mean of the members', or the base's.

        Summed in fp64 and rounded once. Blocks shrink with the number of members, so that memory does not grow with it.
        """
        if self.rest is None:
            yield from super().blocks(origin, dtype)
            return
        weighed = [(member, weight) for member, weight in zip(self.members, self.rest, strict=True) if weight]
        # Sums in fp64 are four times as large as a block in bfloat16, and there are three of them; in the cache they are fast.
        most = max(1, COPY_BLOCK_BYTES // (4 * len(weighed)))
        total_weight = sum(self.rest)
        streams = [member._blocks(origin, "keep", most) for member, _ in weighed]
        for first in streams[0]:
            mean = first.double() * (weighed[0][1] / total_weight)
            for stream, (_, weight) in zip(streams[1:], weighed[1:], strict=True):
                mean += next(stream).double() * (weight / total_weight)
            yield self._checked(origin.name, mean, origin.dtype(self.dtype_of(origin.name, dtype)))

    def feed_forward(self, layer: int, dtype: str = "keep") -> FeedForward:
        """The base's FFN behind the norm that the mix has."""
        ffn = super().feed_forward(layer, dtype)
        norm = self.family.ffn_origins(self.config, layer).get("norm")
        if self.rest is None or norm is None:
            return ffn
        import torch

        return replace(ffn, norm=torch.cat(list(self.blocks(norm, dtype))))

    def expert_matrices(self, layer: int, dtype: str = "keep") -> Callable[[int, str], torch.Tensor] | None:
        """Reads gate, up or down of the FFN of a member; the last one read is kept, for experts that share it."""
        origins = self.family.ffn_origins(self.config, layer)
        kept: dict[tuple[int, str], torch.Tensor] = {}

        def matrix(source: int, part: str) -> torch.Tensor:
            if (source, part) not in kept:
                kept.clear()
                kept[source, part] = self.members[source].whole(origins[part], dtype)
            return kept[source, part]

        return matrix

    def member_ffn(self, source: int, layer: int, dtype: str) -> FeedForward:
        """One source's FFN."""
        return self.members[source].feed_forward(layer, dtype)


def open_sources(recipe: Recipe) -> DenseCheckpoint:
    """The checkpoint of a recipe: one model, or several behind the same interface.

    Raises:
        UpcycleError: one cannot be opened, or they do not belong together.
    """
    base = DenseCheckpoint.open(recipe.source, recipe.revision)
    if not recipe.sources:
        return base
    members = [DenseCheckpoint.open(source.name, source.revision) for source in recipe.sources]
    weights = [source.weight for source in recipe.sources]
    return MixedCheckpoint(base, members, weights, recipe.dtype, recipe.tokenizer == "copy")


def mix_of(checkpoint: DenseCheckpoint) -> Mix | None:
    """What there is to mix; ``None`` for a single model."""
    return checkpoint.mix if isinstance(checkpoint, MixedCheckpoint) else None


def sources_record(checkpoint: DenseCheckpoint, recipe: Recipe) -> list[dict[str, Any]]:
    """What ``upcycle.json`` says of several sources; empty for one."""
    if not isinstance(checkpoint, MixedCheckpoint):
        return []
    return [
        {
            "name": member.source.name,
            "revision": member.source.revision,
            "weight": source.weight,
            "fingerprint": member.fingerprint,
        }
        for member, source in zip(checkpoint.members, recipe.sources, strict=False)
    ]


def all_local(recipe: Recipe) -> bool:
    """Whether nothing needs to be downloaded."""
    return all(is_local(name) for name in (recipe.source, *(source.name for source in recipe.sources)))


def _alike(members: Sequence[DenseCheckpoint]) -> bool:
    """Whether all hold the same numbers. Different files are compared block by block up to the first difference.

    A fine-tune differs in its first block as a rule; only copies are read whole.
    """
    first = members[0]
    others = {member.source.path.resolve(): member for member in members[1:]}
    others.pop(first.source.path.resolve(), None)
    return all(_same(first, other) for other in others.values())


def _same(one: DenseCheckpoint, other: DenseCheckpoint) -> bool:
    import torch

    for name in one.family.all_stored_specs(one.config):
        if one.store.specs[name] != other.store.specs[name]:
            return False
        pairs = zip(one.chunks(name), other.chunks(name), strict=True)
        if not all(torch.equal(a, b) for a, b in pairs):
            return False
    return True
