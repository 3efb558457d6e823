"""Preference distillation: the student should prefer the better answer by more than the dense parent does.

B rows, L positions, P pairs.
"""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

from upcycle.trainers.data.batches import PackedBatch
from upcycle.trainers.losses.next_token import next_token_losses


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
    return int(_compared_pairs(batch).sum())


def _compared_pairs(batch: PackedBatch) -> torch.Tensor:
    """Bool ``[B, N]``: which pairs of neighbouring documents are preferences, N being half the most documents that rows have."""
    if batch.compared is None:
        return torch.zeros(len(batch.ids), 0, dtype=torch.bool, device=batch.ids.device)
    return _by_document(batch.compared.float(), batch)[..., 0] > 0


def _by_document(values: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """Sums of ``values`` ``[B, L]`` over every document, in pairs: ``[B, N, 2]``."""
    number = (batch.positions == 0).cumsum(1) - 1
    most = int(number.max()) + 1
    sums = values.new_zeros(len(values), most + most % 2).scatter_add(1, number, values)
    return sums.view(len(values), -1, 2)


def _answers(logits: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """The log probability of both answers of every pair: ``[P, 2]``."""
    assert batch.compared is not None
    nats = next_token_losses(logits, batch.ids) * batch.compared[:, 1:]
    padded = torch.nn.functional.pad(nats, (1, 0))
    return -_by_document(padded, batch)[_compared_pairs(batch)]
