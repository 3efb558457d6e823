"""Gives several fine-tunes of one model, read side by side, behind the interface of one checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.architectures.tensor_origin import Origin
from upcycle.checkpoints.checkpoint import COPY_BLOCK_BYTES, DenseCheckpoint
from upcycle.checkpoints.merged_checkpoint import SUM_BYTES, JoinedCheckpoint, MergedStore
from upcycle.checkpoints.slerp import slerp_coefficients

if TYPE_CHECKING:
    import torch

    from upcycle.ffn.feed_forward import FeedForward
    from upcycle.recipe.recipe_parts import SourceRecipe


@dataclass(frozen=True)
class Mix:
    """Describes the mixed models to a mixing method.

    Attributes:
        weights: the recipe's weight of each model, which is a source or a merge of sources.
        alike: whether all models and the base hold the same numbers, so that any mix of them is the dense function.
        base: the index of the recipe's ``source`` among the models; their number where it is not among them.
        recipes: what the recipe says about each model, in the same order.
    """

    weights: tuple[float, ...]
    alike: bool
    base: int
    recipes: tuple[SourceRecipe, ...] = ()

    @property
    def count(self) -> int:
        """The number of models that are mixed."""
        return len(self.weights)


class MixedCheckpoint(JoinedCheckpoint):
    """Several checkpoints of one shape, mixed.

    Configuration, tokenizer and :meth:`read` are those of the base. The matrices of an expert are read from the member that it
    belongs to. All other tensors are averages of the members' tensors, or with ``slerp``, for the matrices of attention,
    interpolations on the sphere.

    Args:
        base: the recipe's ``source``.
        members: the models that are mixed: the recipe's ``sources``, or merges of some of them.
        weights: the members' weights.
        dtype: the recipe's dtype; for ``keep``, every tensor must have the same dtype in all members.
        tokenizers: compare tokenizers.
        sources: the recipe's ``sources``; default: the members.
        experts_only: read nothing but FFNs from members that are not the base, and compare only what FFNs depend on.

    Raises:
        UsageError: the members cannot be mixed; the message names the sources, the key and both values.
    """

    def __init__(
        self,
        base: DenseCheckpoint,
        members: Sequence[DenseCheckpoint],
        weights: Sequence[float],
        dtype: str = "keep",
        tokenizers: bool = True,
        sources: Sequence[DenseCheckpoint] | None = None,
        experts_only: bool = False,
    ) -> None:
        where = [i for i, member in enumerate(members) if _files(member) == _files(base)]
        base_index = where[0] if where else len(members)
        super().__init__((*members, members[where[0]] if where else base), dtype, tokenizers, experts_only)
        self.sources = tuple(members if sources is None else sources)
        self.mix = Mix(tuple(weights), _alike(self.members), base_index)
        # The members' weights in the mean of all tensors but the experts'; None: the base's tensors are taken.
        self.rest: tuple[float, ...] | None = None
        self.slerp = False

    def joining(self, rest: tuple[float, ...] | None, slerp: bool) -> MixedCheckpoint:
        """Return the same checkpoint, told how what is no expert is joined.

        Args:
            rest: weights in the mean, one per member; None: the base's tensors alone.
            slerp: whether matrices of attention are interpolated on the sphere.
        """
        joined = copy(self)
        joined.rest, joined.slerp = rest, slerp
        return joined

    def blocks(self, origin: Origin, dtype: str = "keep") -> Iterator[torch.Tensor]:
        """Yield a tensor of the converted model that belongs to no expert: the members' mean, or the base's.

        Means are computed in fp64 and rounded once.
        """
        if self.rest is None or origin.filled:
            yield from super().blocks(origin, dtype)
            return
        weights, total = self._weights(origin)
        joined = MergedStore(self.members, weights, "float64", total)
        wanted = origin.dtype(self.dtype_of(origin.name, dtype))
        for block in joined.chunks(origin.name, SUM_BYTES, origin.rows, origin.head):
            yield self._checked(origin.name, origin.apply(block), wanted)

    def _weights(self, origin: Origin) -> tuple[Sequence[float], float | None]:
        """Return a factor for each member's tensor, and the divisor of their sum (None: the sum of the factors)."""
        assert self.rest is not None
        is_matrix = len(self.store.specs[origin.name].shape) > 1
        paths = self.family.module_paths
        in_a_layer = paths.layer_of(origin.name) is not None and f".{paths.block}." not in origin.name
        if not (self.slerp and is_matrix and in_a_layer):
            return self.rest, None
        import torch

        weighed = [i for i, weight in enumerate(self.rest) if weight]
        most = max(1, COPY_BLOCK_BYTES // len(weighed))
        gram = torch.zeros(len(weighed), len(weighed), dtype=torch.float64)
        streams = (self.members[i].store.chunks(origin.name, most, origin.rows, origin.head) for i in weighed)
        for blocks in zip(*streams, strict=True):
            flat = torch.stack([block.double().flatten() for block in blocks])
            gram += flat @ flat.T
        found = slerp_coefficients(gram.tolist(), [self.rest[i] for i in weighed])
        factors = dict(zip(weighed, found, strict=True))
        return [factors.get(i, 0.0) for i in range(len(self.rest))], 1.0

    def feed_forward(self, layer: int, dtype: str = "keep") -> FeedForward:
        """Return the base's FFN, with the norm before it (weight, and bias if it has one) taken from the mix."""
        ffn = super().feed_forward(layer, dtype)
        return ffn if self.rest is None else replace(ffn, **self.norm_before(layer, dtype))

    def norm_before(self, layer: int, dtype: str = "keep") -> dict[str, Any]:
        """Return the mix's ``norm`` and ``norm_bias`` before an FFN, those that there are, each ``[d]``."""
        import torch

        origins = self.family.ffn_origins(self.config, layer)
        found = {part: origins[part] for part in ("norm", "norm_bias") if part in origins}
        return {part: torch.cat(list(self.blocks(origin, dtype))) for part, origin in found.items()}

    def expert_matrices(self, layer: int, dtype: str = "keep") -> Callable[[int, str], torch.Tensor] | None:
        """Return a function that reads ``gate``, ``up`` or ``down`` of a member's FFN.

        It keeps the last matrix that it read, for experts that share it.
        """
        dtype = self.family.ffn_dtype(self.config, self.store.specs, layer, dtype)
        kept: dict[tuple[int, str], torch.Tensor] = {}

        def matrix(source: int, part: str) -> torch.Tensor:
            if (source, part) not in kept:
                kept.clear()
                member = self.members[source]
                kept[source, part] = member.whole(member.family.ffn_origins(member.config, layer)[part], dtype)
            return kept[source, part]

        return matrix


def _alike(members: Sequence[DenseCheckpoint]) -> bool:
    """Return whether all members hold the same numbers, comparing block by block up to the first difference.

    Fine-tunes usually differ in the first block, so only copies are read whole.
    """
    first = members[0]
    others = {(*_files(member), member.fingerprint): member for member in members[1:]}
    others.pop((*_files(first), first.fingerprint), None)
    return all(_same(first, other) for other in others.values())


def _files(checkpoint: DenseCheckpoint) -> list[Path]:
    return [path.resolve() for path in checkpoint.paths]


def _same(one: DenseCheckpoint, other: DenseCheckpoint) -> bool:
    import torch

    for name in one.family.all_stored_specs(one.config):
        if one.store.specs[name] != other.store.specs.get(name):
            return False
        pairs = zip(one.chunks(name), other.chunks(name), strict=True)
        if not all(torch.equal(a, b) for a, b in pairs):
            return False
    return True
