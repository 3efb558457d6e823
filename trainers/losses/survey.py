"""Which models must run forward through all passes of a step before its first backward pass.

A loss that is not a mean over tokens, such as Switch's product of two means, is not the sum of its passes' losses. Its gradient
in one pass needs sums over the whole global batch, which are known only after every pass has run forward. So each pass runs
forward twice: in a survey without gradients, for the sums alone, and then again with them. The only other way is to keep all
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
    """Which models run forward once more in every pass of a step, without gradients."""

    student: bool = False
    parent: bool = False


def needed(
    losses: Sequence[Loss] | Mapping[str, Mapping[str, Any]],
    distillation: DistillationParameters | None,
    passes: int,
    over: str,
) -> Survey:
    """The survey that a stage's losses need in every step.

    Args:
        losses: the stage's, made or as its recipe names them.
        distillation: the stage's distillation from a parent, if any.
        passes: of a rank per step. A single one needs no survey: sums are exchanged between its forward and backward pass.
        over: the stage's ``losses_over``: ``batch``, or ``pass`` for losses of each pass alone, which need no survey.
    """
    if passes == 1 or over == "pass":
        return Survey()
    made = make_losses(losses) if isinstance(losses, Mapping) else losses
    one = torch.ones(1, 1, dtype=torch.bool)
    matched = distillation is not None and (distillation.hidden > 0 or distillation.ffn > 0)
    return Survey(any(loss.mean_over(one) is None for loss in made), matched)
