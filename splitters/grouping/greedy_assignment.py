"""Greedy assignment: again and again the best (point, group) pair that is still possible."""

from __future__ import annotations

import torch
from torch.nn.functional import one_hot


def greedy_assignment(scores: torch.Tensor, room: torch.Tensor, extra: int = 0) -> torch.Tensor:
    """Assign as if the best pair of a free point and a group with room were taken again and again.

    Ties go to the lower point, then to the lower group. Instead of one pair per step, every step looks up all free
    points' best open group and takes them in order until the first group is full: until then no point's best group
    changes, so the result is that of the pair-by-pair loop, after at most ``G + 1`` steps.

    Args:
        scores: ``[N, G]``, higher is better.
        room: int64 ``[G]``, how many points each group takes.
        extra: how many groups may take one more, whichever want it first; ``sum(room) + extra >= N``.

    Returns:
        Int64 ``[N]`` in ``0..G-1``.
    """
    labels = torch.full((len(scores),), -1)
    left = room.clone()  # -1 once a group has its extra point
    free = torch.arange(len(scores))
    while len(free):
        # Down to -1 while extra points are left, so that one comparison serves a group's own room and its extra point.
        last = -1 if extra else 0
        closed = left <= last
        best, group = scores[free].masked_fill(closed, -torch.inf).max(dim=1)
        # A score of minus infinity must not lead into a closed group.
        group = torch.where(closed[group], (~closed).int().argmax(), group)
        order = best.argsort(descending=True, stable=True)
        wanted = one_hot(group[order], len(room)).cumsum(0)
        filled = ((wanted == left - last) & ~closed).any(dim=1).nonzero()
        taken = order[: int(filled[0]) + 1] if len(filled) else order
        labels[free[taken]] = group[taken]
        left -= torch.bincount(group[taken], minlength=len(room))
        extra -= int((left[group[taken[-1]]] == -1).item())
        free = free[labels[free] < 0]
    return labels
