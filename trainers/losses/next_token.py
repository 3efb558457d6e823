"""The loss on tokens, to which every other loss of a step is added: of the next token, or of masked ones.

B rows, L positions, V vocabulary.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from upcycle.trainers.data.packing import PackedBatch
from upcycle.trainers.losses.vocabulary import NO_TARGET, token_nats


def next_token_losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """``-log p`` of every next token in nats: ``[B, L - 1]``, in at least fp32.

    Args:
        logits: ``[B, L, V]``, any floating dtype.
        ids: int64 ``[B, L]``.
    """
    # The last position has no target. It is masked rather than cut off: a slice would copy the gradient of all logits.
    return token_nats(logits, pad(ids[:, 1:], (0, 1), value=NO_TARGET))[:, :-1]


def token_losses(logits: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """``-log p`` in nats of every token that a batch has to predict, at positions 1 and on: ``[B, L - 1]``; 0 elsewhere.

    Args:
        logits: ``[B, L, V]``, any floating dtype.
        batch: what the model read. Where tokens are masked, each is predicted at its own place, else at the one before.
    """
    if batch.given is None:
        return next_token_losses(logits, batch.ids) * batch.mask[:, 1:]
    return token_nats(logits, batch.ids.masked_fill(~batch.mask, NO_TARGET))[:, 1:]
