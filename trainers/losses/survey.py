"""What every pass of a step must know of all of them, gathered before the first backward pass.

A loss that is no mean over tokens, such as Switch's product of two means, is not the sum of its passes' losses. Its gradient in
one pass needs sums over the whole global batch, which are known only when every pass has run forward. So they run forward
twice: once without gradients, for the sums alone, and then for good. Nothing else gives that gradient without keeping all
passes' activations, which is what a larger ``micro_batch`` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from upcycle.trainers.losses.base import Loss, make_losses
from upcycle.trainers.recipe.part_recipes import DistillationParameters


@dataclass(frozen=True)
class Survey:
    """Which models run forward once more in every pass of a step."""

    student: bool = False
    parent: bool = False


def needed(
    losses: Sequence[Loss] | Mapping[str, Mapping[str, Any]],
    distillation: DistillationParameters | None,
    passes: int,
    over: str,
) -> Survey:
    """What a stage's steps must survey.

    Args:
        losses: the stage's, made or as its recipe names them.
        distillation: what the student is told of its parent, if anything.
        passes: of a rank per step; the sums of a single one are exchanged between its forward and its backward pass.
        over: what losses are of, the stage's ``losses_over``.
    """
    if passes == 1 or over == "pass":
        return Survey()
    made = make_losses(losses) if isinstance(losses, Mapping) else losses
    one = torch.ones(1, 1, dtype=torch.bool)
    matched = distillation is not None and (distillation.hidden > 0 or distillation.ffn > 0)
    return Survey(any(loss.mean_over(one) is None for loss in made), matched)
