"""Describes an output before it is written: its tensors and what they are made from, the units they form, and the files."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from upcycle.architectures.moe.base import OutputTensor
from upcycle.architectures.tensor_origin import Origin
from upcycle.errors import CheckpointError
from upcycle.files.formats.tensor_files import SINGLE
from upcycle.files.formats.tensor_spec import TensorSpec


@dataclass(frozen=True)
class OutputEntry:
    """One tensor to write: copied from the source (``origin``), or built from the parts of a layer (``built``)."""

    name: str
    spec: TensorSpec
    origin: Origin | None = None
    built: OutputTensor | None = None


@dataclass(frozen=True)
class Unit:
    """The tensors that are converted together and recorded when finished: embeddings, one layer, or the final norm and head."""

    name: str
    layer: int | None
    entries: tuple[OutputEntry, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(entry.spec.nbytes for entry in self.entries)


@dataclass(frozen=True)
class Shard:
    """One weight file and the units in it."""

    file: str
    units: tuple[Unit, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(unit.nbytes for unit in self.units)


def shards_of(units: list[Unit], most_bytes: int) -> tuple[Shard, ...]:
    """Distribute units, in order, over files of at most ``most_bytes``; a unit is never divided, so a file may be larger."""
    groups: list[list[Unit]] = [[]]
    for unit in units:
        if groups[-1] and sum(u.nbytes for u in groups[-1]) + unit.nbytes > most_bytes:
            groups.append([])
        groups[-1].append(unit)
    if len(groups) == 1:
        return (Shard(SINGLE, tuple(units)),)
    count = len(groups)
    return tuple(
        Shard(f"model-{i:05d}-of-{count:05d}.safetensors", tuple(group)) for i, group in enumerate(groups, start=1)
    )


def checked_finite(entry: OutputEntry, block: torch.Tensor) -> torch.Tensor:
    """Return a built block after checking it, as scaling or a refit can make weights too large for their dtype.

    Raises:
        CheckpointError: the block holds NaN or Inf; the message names the tensor.
    """
    if block.numel() and not all(bool(extreme.isfinite()) for extreme in block.aminmax()):
        raise CheckpointError(
            f"{entry.name}: after scaling or fitting, its weights overflow {entry.spec.dtype}",
            hint="--dtype float32" if entry.spec.dtype == "bfloat16" else "--dtype bfloat16 or float32",
        )
    return block
