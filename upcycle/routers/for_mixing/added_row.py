"""Fits the row of a router for an expert that is added to those it knows, by ridge regression on the inputs of the router.

T tokens, E experts that are known, d the hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from upcycle.ffn.ridge_sums import RidgeSums

_BATCH = 4096  # tokens


class RowTokens(NamedTuple):
    """What a router read.

    Attributes:
        x: ``[T, d]``, its inputs.
        new: boolean, ``[T]``, which tokens are of the new expert's kind of text.
        held: boolean, ``[T]``, which tokens only judge.
    """

    x: torch.Tensor
    new: torch.Tensor
    held: torch.Tensor


class AddedRow(NamedTuple):
    """A row fp64 ``[d]``; the unit of its labels, and the strength of its ridge."""

    row: torch.Tensor
    unit: float
    strength: float


def fit_row(tokens: RowTokens, rows: torch.Tensor, sharpness: float = 1.0) -> AddedRow:
    """Return the row of a new expert, given those ``[E, d]`` of the others, which stay as they are.

    DUME (arXiv 2603.29765) fits all rows to one-hot labels of the domains by ridge regression. When a domain is added, the new
    expert's row, less the mean of the others', is the ridge solution for the labels 1 on its text and -1/E on all other text,
    whatever the others' labels are: these add up to 1 there. It is added to the mean of the rows that the router has, in the unit of
    these: how far the largest logit lies above the mean of all on the other text, over the 1 - 1/E that labels do.

    The new text counts as much as all other text together, however long they are. The ridge's strength is the one with the least
    squared error on held-out tokens; then all are fitted.

    Args:
        tokens: of both kinds of text.
        rows: of the experts that are known.
        sharpness: multiplies the unit.
    """
    experts, rows = len(rows), rows.double()
    labels = torch.where(tokens.new, 1.0, -1.0 / experts).double()
    weight = row_weights(tokens.new)
    sums = RidgeSums(tokens.x.shape[1], 1)
    above = 0.0
    for outside in (False, True):
        for some in torch.where(tokens.held == outside)[0].split(_BATCH):
            sums.add(tokens.x[some], labels[some, None], weight[some], held_out=outside)
            logits = tokens.x[some][~tokens.new[some]].double() @ rows.T
            above += (logits.amax(1) - logits.mean(1)).sum().item()
    # A router that makes no difference, or knows one expert alone, has no unit of its own.
    unit = above / int((~tokens.new).sum()) / (1 - 1 / experts) if above > 0 else 1.0
    strength = sums.best().strength
    return AddedRow(rows.mean(0) + sharpness * unit * sums.solve(strength).weights[:, 0], unit, strength)


def row_weights(new: torch.Tensor) -> torch.Tensor:
    """Return what every token counts, fp64 ``[T]``: mean 1, and half of it all on either side."""
    share = new.double().mean()
    return torch.where(new, 0.5 / share, 0.5 / (1 - share))
