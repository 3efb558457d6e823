"""Preference distillation: the student should prefer the better answer by more than the dense parent does.

B rows, L positions, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import logsigmoid

from upcycle.errors import UsageError
from upcycle.trainers.data.packing import PackedBatch
from upcycle.trainers.losses.next_token import next_token_losses
from upcycle.trainers.recipe.training_recipe import StageRecipe


def preference_losses(student: torch.Tensor, parent: torch.Tensor, batch: PackedBatch, beta: float) -> torch.Tensor:
    """``-log sigmoid(beta [(S_w - T_w) - (S_l - T_l)])`` of every pair: ``[P]``.

    S and T are the student's and the parent's log probabilities of the better (w) and the worse answer (l), summed over its tokens
    (LLaVA-MoD, arXiv 2408.15881, preference distillation: DPO, arXiv 2305.18290, with the teacher as reference).

    Args:
        student: its logits ``[B, L, V]``, any floating dtype.
        parent: the same; its gradient is not computed. A shorter vocabulary is enough: the student's is cut to it.
        batch: the rows.
        beta: how much a difference counts.
    """
    of_parent = _answers(parent.detach(), batch)
    margins = _answers(student[..., : parent.shape[-1]], batch) - of_parent  # [P, 2]
    return -logsigmoid(beta * (margins[:, 0] - margins[:, 1]))


def pairs_in(batch: PackedBatch) -> int:
    """The number P of preferences in a batch."""
    if batch.compared is None:
        return 0
    return int((_by_document(batch.compared.float(), batch) > 0).sum()) // 2


def check_preferences(stage: StageRecipe, domains: Sequence[str]) -> None:
    """Refuse preferences that no loss compares, and a loss that has none to compare; ``domains`` are those of preferences.

    Raises:
        UsageError: the stage has one without the other.
    """
    weight = stage.distillation.preference if stage.distillation else 0.0
    if domains and not weight:
        raise UsageError(
            f"stage '{stage.name}': domain '{domains[0]}' holds preferences, and no loss compares their answers",
            hint="set distillation: {preference: 1.0} in the stage, whose parent is the reference",
        )
    if weight and not domains:
        raise UsageError(
            f"stage '{stage.name}': distillation.preference is {weight:g}, and no domain holds preferences",
            hint="name the columns of the answers in a domain: chosen and rejected",
        )


def _by_document(values: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """Sums of ``values`` ``[B, L]`` over every document: ``[B, N]``, N being the most documents that a row has."""
    number = (batch.positions == 0).cumsum(1) - 1
    return values.new_zeros(len(values), int(number.max()) + 1).scatter_add(1, number, values)


def _answers(logits: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """The log probability of both answers of every pair: ``[P, 2]``. Of documents with compared answers, every second is worse."""
    assert batch.compared is not None
    nats = next_token_losses(logits, batch.ids) * batch.compared[:, 1:]
    of_documents = _by_document(torch.nn.functional.pad(nats, (1, 0)), batch)
    return -of_documents[_by_document(batch.compared.float(), batch) > 0].view(-1, 2)
