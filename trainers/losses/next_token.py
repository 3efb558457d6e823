"""The next-token loss, to which every other loss of a step is added. B rows, L positions, V vocabulary."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy, pad

from upcycle.trainers.routing.routing_rule import widened

_NO_TARGET = -100


def next_token_losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """``-log p`` of every next token in nats: ``[B, L - 1]``, in at least fp32.

    Args:
        logits: ``[B, L, V]``, any floating dtype.
        ids: int64 ``[B, L]``.
    """
    # The last position has no target. It is masked rather than cut off: a slice would copy all logits and their gradient.
    targets = pad(ids[:, 1:], (0, 1), value=_NO_TARGET)
    nats = cross_entropy(widened(logits).flatten(0, 1), targets.flatten(), reduction="none", ignore_index=_NO_TARGET)
    return nats.view(ids.shape)[:, :-1]
