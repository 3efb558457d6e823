"""Gives several fine-tunes of one model as one dense model, their weighted mean, which is computed block by block."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.architectures.tensor_origin import Origin
from upcycle.checkpoints.checkpoint import DenseCheckpoint
from upcycle.checkpoints.compatibility import check_sources
from upcycle.files.formats.tensor_files import row_blocks
from upcycle.files.formats.tensor_spec import TensorSpec

if TYPE_CHECKING:
    import torch

    from upcycle.recipe.conversion_recipe import Recipe

SUM_BYTES = 1 << 22  # size of the fp64 sums, small enough to stay in the processor's cache


class MergedStore:
    """Gives the weighted mean of several checkpoints' tensors, summed in fp64 and rounded once.

    Only some rows of one member's tensor are in memory at a time, beside their sum, so more members need no more memory.

    Args:
        members: checkpoints of one configuration.
        weights: one for each member, which need not sum to 1; at least one above 0. A member of weight 0 is not read.
        dtype: the dtype of the mean; ``keep``: that of the members, and the widest where they differ.
        total: the number that the sum is divided by; None: the sum of the weights.
    """

    def __init__(
        self,
        members: Sequence[DenseCheckpoint],
        weights: Sequence[float],
        dtype: str = "keep",
        total: float | None = None,
    ) -> None:
        self.parts = [(member, weight) for member, weight in zip(members, weights, strict=True) if weight]
        self._total = math.fsum(weights) if total is None else total
        first, _ = self.parts[0]
        shapes = first.family.all_stored_specs(first.config)
        self.specs = {name: TensorSpec(shape, self._dtype(name, dtype)) for name, shape in shapes.items()}

    def _dtype(self, name: str, dtype: str) -> str:
        if dtype != "keep":
            return dtype
        import torch

        stored = (getattr(torch, member.store.specs[name].dtype) for member, _ in self.parts)
        return str(reduce(torch.promote_types, stored)).removeprefix("torch.")

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the members' fingerprints and their weights."""
        text = "\n".join(f"{member.fingerprint} {weight!r}" for member, weight in self.parts)
        return hashlib.sha256(text.encode()).hexdigest()

    def sample(self) -> str:
        """Return the SHA-256 over the members' samples."""
        return hashlib.sha256("\n".join(member.store.sample() for member, _ in self.parts).encode()).hexdigest()

    def location(self, name: str) -> str:
        """Return the paths of the files whose mean a tensor is, for messages."""
        return " + ".join(member.store.location(name) for member, _ in self.parts)

    def chunks(
        self, name: str, most_bytes: int, part: tuple[int, int] | None = None, multiple: int = 1
    ) -> Iterator[torch.Tensor]:
        """Yield a mean, or its rows ``part``, as blocks of its first dimension.

        Raises:
            CheckpointError: a member holds NaN or Inf; the message names its file.
        """
        for first, count in row_blocks(self.specs[name], most_bytes, part, multiple):
            yield self._rows(name, first, count)

    def read(self, name: str) -> torch.Tensor:
        """Return one whole mean; raises as :meth:`chunks` does."""
        return self._rows(name, 0, self.specs[name].shape[0])

    def _rows(self, name: str, first: int, count: int) -> torch.Tensor:
        import torch

        spec = self.specs[name]
        pieces = list(row_blocks(TensorSpec(spec.shape, "float64"), SUM_BYTES, (first, count)))
        dtype = getattr(torch, spec.dtype)
        if len(pieces) == 1:
            return self._mean(name, first, count).to(dtype)
        rows = torch.empty((count, *spec.shape[1:]), dtype=dtype)
        for start, some in pieces:
            rows[start - first : start - first + some] = self._mean(name, start, some)
        return rows

    def _mean(self, name: str, first: int, count: int) -> torch.Tensor:
        """Return the mean of some rows, in fp64. Dividing once, at the end, makes the mean of equal numbers exact."""
        total: torch.Tensor | None = None
        for member, weight in self.parts:
            block = member.whole(Origin(name, (first, count)), "float64")
            total = block.mul_(weight) if total is None else total.add_(block, alpha=weight)
        assert total is not None
        return total.div_(self._total)


class JoinedCheckpoint(DenseCheckpoint):
    """Several checkpoints behind the interface of one; configuration, tokenizer and tensors are those of the last, the base.

    Args:
        members: the checkpoints, the base last.
        dtype: the recipe's dtype; for ``keep``, every tensor must have the same dtype in all members.
        tokenizers: compare tokenizers.
        experts_only: compare only what FFNs depend on, since nothing else is read from members that are not the base.

    Raises:
        UsageError: the members cannot be mixed; the message names the sources, the key and both values.
    """

    def __init__(
        self,
        members: Sequence[DenseCheckpoint],
        dtype: str = "keep",
        tokenizers: bool = True,
        experts_only: bool = False,
    ) -> None:
        self.members = tuple(members)
        super().__init__(self.members[-1].source)
        check_sources(self.members, dtype, tokenizers, experts_only)
        together = "\n".join(member.fingerprint for member in self.members)
        self.fingerprint = hashlib.sha256(together.encode()).hexdigest()

    @property
    def paths(self) -> list[Path]:
        """The folders and files that are read, one per member."""
        return [path for member in self.members for path in member.paths]

    @property
    def modified(self) -> list[int]:
        """The modification time of each weight file of every member, in nanoseconds."""
        return [time for member in self.members for time in member.modified]

    @property
    def version(self) -> list[Any]:
        """What tells versions of each member apart."""
        return [member.version for member in self.members]


class MergedCheckpoint(JoinedCheckpoint):
    """A dense model whose weights are the weighted mean of its members' weights.

    Args:
        base: the model whose configuration and tokenizer are used.
        members: the models that are averaged.
        weights: the members' weights, which need not sum to 1.
        dtype: the recipe's dtype; for ``keep``, every tensor must have the same dtype in all members.
        tokenizers: compare tokenizers.

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
    ) -> None:
        super().__init__((*members, base), dtype, tokenizers)
        self.store = merged = MergedStore(members, weights)
        self.parts = merged.parts  # (member, weight) for each weight that is not 0
        self.source = replace(base.source, name=" + ".join(member.source.name for member in members), adapter=None)
        self.adapted = None  # the members' adapters are in their tensors
        self.fingerprint = hashlib.sha256((self.fingerprint + self.store.fingerprint).encode()).hexdigest()


def weighted_mean(recipe: Recipe, base: DenseCheckpoint, parts: Mapping[DenseCheckpoint, float]) -> DenseCheckpoint:
    """Return the weighted mean of sources, or the source itself where only one has a weight other than 0.

    Raises:
        UsageError: the sources cannot be mixed.
    """
    used = {source: weight for source, weight in parts.items() if weight}
    if len(used) == 1:
        return next(iter(used))
    return MergedCheckpoint(base, list(used), list(used.values()), recipe.dtype, recipe.tokenizer == "copy")
