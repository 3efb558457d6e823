"""The dense parent's loss on every domain's held-out text, which dynamic weights compare the student's with."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from upcycle.trainers.checkpoints.prepare_model import check_parent, parent_folder
from upcycle.trainers.data.packing import PackedBatch
from upcycle.trainers.distillation.frozen_shards import load_parent
from upcycle.trainers.distributed.ranks import Ranks
from upcycle.trainers.recipe.data_recipe import DataRecipe
from upcycle.trainers.run.validation import validate


def reference_parent(data: DataRecipe, origin: Path) -> Path | None:
    """The folder of the parent whose losses must be measured; ``None`` where weights are static or the recipe gives the losses.

    Args:
        data: of a stage.
        origin: folder of the model that is trained.

    Raises:
        UsageError: the recipe names no parent, and the model does not say what it was converted from.
    """
    if data.dynamic is None or data.dynamic.reference is not None:
        return None
    return parent_folder(data.dynamic.parent, origin, "data.dynamic.parent", "dynamic.reference: {DOMAIN: NATS}")


def reference_losses(
    folder: Path,
    student: Any,
    held_out: Mapping[str, Sequence[PackedBatch]],
    dtype: torch.dtype,
    ranks: Ranks,
    divides: bool = False,
) -> dict[str, float]:
    """The parent's mean next-token loss of every domain, in nats per target. It is in memory only while this runs.

    Args:
        folder: the dense parent's.
        student: the model that is trained; both must share their tokens.
        held_out: the domains' validation batches, on which the student's losses are measured, too.
        dtype: what the parent computes in.
        ranks: all of them; each runs a part of the batches.
        divides: whether the parent's weights are divided among them.

    Raises:
        UpcycleError: the parent cannot be loaded, or has other tokens.
    """
    parent = load_parent(folder, dtype, ranks, divides)
    check_parent(
        parent, student, folder, max((batch.ids.shape[1] for part in held_out.values() for batch in part), default=0)
    )
    losses = validate(parent, held_out, ranks)
    del parent
    gc.collect()
    return losses
