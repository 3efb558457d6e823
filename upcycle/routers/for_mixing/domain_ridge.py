"""Domain-ridge router: the rows that best tell, in closed form, from which source's domain a token is."""

from __future__ import annotations

import torch
from torch.nn.functional import one_hot

from upcycle.ffn.activations import Activations
from upcycle.ffn.ridge_sums import RidgeSums
from upcycle.routers.calibrated.ridge import centred, fitted_rows
from upcycle.routers.for_mixing.base import SourceRouter, labelled


class DomainRidgeRouter(SourceRouter):
    """DUME's router (arXiv 2603.29765): ridge regression of one-hot domain labels on the router's inputs, given one sample
    text per source (``text``).

    Deviations. Labels are centred over the experts, which changes no choice and no weight. Every domain counts the same,
    however many tokens its text has. The ridge's strength is the one with the least squared error on held-out windows.
    Inputs are those of the recipe's ``source``. Predictions lie about between 0 and 1, so that experts weigh at most
    e : 1; ``sharpness`` changes that.
    """

    name = "domain_ridge"
    title = "Ridge regression of domains"
    paper = "https://arxiv.org/abs/2603.29765"
    samples = "text"

    def source_rows(self, activations: Activations, models: int) -> torch.Tensor:
        """Return fp64 ``[models, d]``."""
        assert activations.samples is not None
        sums = RidgeSums(activations.ffn.hidden_size, models)
        tokens = len(activations.samples.owner)
        for batch, owner, share in labelled(activations):
            weight = share.clamp(min=0) * (tokens / models)  # mean one
            sums.add(batch.x, centred(one_hot(owner, models)), weight, batch.held_out)
        return fitted_rows(sums)
