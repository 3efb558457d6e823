"""Measures how alike fine-tunes of one model are: the mean cosine of their weights' columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from upcycle.architectures.tensor_origin import Origin
from upcycle.checkpoints.merged_checkpoint import SUM_BYTES
from upcycle.files.formats.tensor_files import row_blocks
from upcycle.files.formats.tensor_spec import TensorSpec
from upcycle.progress import SILENT, Progress

if TYPE_CHECKING:
    from upcycle.checkpoints.checkpoint import DenseCheckpoint


def similarities(
    members: Sequence[DenseCheckpoint], base: DenseCheckpoint | None = None, progress: Progress = SILENT
) -> torch.Tensor:
    """Return the similarity of every pair of ``members``: fp64 ``[S, S]``, symmetric, 1 on the diagonal.

    As in Model-GLUE (arXiv 2410.05357, ``merging/heuristic_merge.py``), it is the mean over all tensors named ``self_attn`` or
    ``mlp`` of the mean cosine of the tensor's columns (dimension 0). With a ``base``, differences from it are compared.

    A column that is zero in both models does not count (a frozen tensor, where differences are compared); one that is zero in
    one of them counts as 0. Where no column counts, the models are equal, and their similarity is 1. All models are read
    once, side by side, with some rows of one tensor in memory.
    """
    first, count = members[0], len(members)
    total, tensors = (torch.zeros(count, count, dtype=torch.float64) for _ in range(2))
    with progress.phase("comparing sources", first.config.num_hidden_layers):
        for layer in range(first.config.num_hidden_layers):
            for name in _compared(first, layer):
                mean, columns = _cosines(members, base, name)
                total += mean
                tensors += columns > 0
            progress.advance()
    found = torch.where(tensors > 0, total / tensors.clamp(min=1), 1.0)
    return found.fill_diagonal_(1.0)


def _compared(checkpoint: DenseCheckpoint, layer: int) -> list[str]:
    """Return the stored names of the tensors of attention and of the FFN, which not every family calls ``mlp``."""
    origins = checkpoint.family.ffn_origins(checkpoint.config, layer)
    ffn = {origin.name for part, origin in origins.items() if part not in ("norm", "norm_bias")}
    stored = checkpoint.family.stored_specs(checkpoint.config, layer)
    return [name for name in stored if "self_attn" in name or "mlp" in name or name in ffn]


def _cosines(
    members: Sequence[DenseCheckpoint], base: DenseCheckpoint | None, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one tensor's mean cosine and its number of columns that count, each fp64 ``[S, S]``."""
    count = len(members)
    products: torch.Tensor | None = None  # [S, S, C]
    for blocks in _side_by_side(members, base, name):
        if products is None:
            products = blocks.new_zeros(count, count, blocks.shape[-1])
        for i in range(count):
            products[i, i:] += (blocks[i] * blocks[i:]).sum(1)
    assert products is not None
    lengths = products.diagonal().T.sqrt()  # [S, C]
    zero = lengths == 0
    lengths = lengths.masked_fill(zero, 1.0)
    counted = ~(zero[:, None] & zero[None])
    cosines = (products / lengths[:, None] / lengths[None]).sum(-1)
    columns = counted.sum(-1).double()
    mean = (cosines / columns.clamp(min=1)).triu()
    return mean + mean.triu(1).T, columns


def _side_by_side(
    members: Sequence[DenseCheckpoint], base: DenseCheckpoint | None, name: str
) -> Iterator[torch.Tensor]:
    """Yield the same rows of every member, less the base's, fp64 ``[S, R, C]``; a vector is one column."""
    shape = members[0].store.specs[name].shape
    for rows in row_blocks(TensorSpec(shape, "float64"), SUM_BYTES // len(members)):
        origin = Origin(name, rows)
        blocks = torch.stack([member.whole(origin, "float64").view(rows[1], -1) for member in members])
        yield blocks if base is None else blocks.sub_(base.whole(origin, "float64").view(rows[1], -1))
