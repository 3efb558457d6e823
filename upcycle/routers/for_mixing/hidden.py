"""Hidden router: the model's states on each expert's prompts."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch.nn.functional import normalize

from upcycle.ffn.activations import Activations
from upcycle.routers.for_mixing.base import SourceParameters, SourceRouter, labelled


class HiddenParameters(SourceParameters):
    """Parameters of :class:`HiddenRouter`."""

    tokens: Literal["mean", "last"] = Field(
        "mean",
        description="a prompt's state: the mean of its tokens' (mergekit's hidden_avg), or the last one's (hidden)",
    )


class HiddenRouter(SourceRouter):
    """mergekit-moe's ``hidden_avg`` and ``hidden``: row i is the mean state of expert i's positive prompts less that of its
    negative ones, of length one (times ``sharpness``).

    Deviations. States are taken behind the norm before the FFN, where the router reads; mergekit takes the residual stream at
    the layer's input. Padding and special tokens do not count; every prompt counts the same, whatever its length. The model
    that runs is the recipe's ``source``, as there; the experts' own states are not used.
    """

    name = "hidden"
    title = "Hidden states of prompts"
    paper = None  # https://github.com/arcee-ai/mergekit, docs/moe.md
    Parameters = HiddenParameters
    parameters: HiddenParameters

    def __init__(self, parameters: HiddenParameters) -> None:
        super().__init__(parameters)
        self.last_token = parameters.tokens == "last"

    def source_rows(self, activations: Activations, models: int) -> torch.Tensor:
        """Return fp64 ``[models, d]``, rows of length 1."""
        return normalize(prompt_means(activations, models), dim=1)


def prompt_means(activations: Activations, models: int) -> torch.Tensor:
    """Return fp64 ``[models, d]``: the sum of all tokens' vectors times their share."""
    sums = torch.zeros(models, activations.ffn.hidden_size, dtype=torch.float64)
    for batch, owner, share in labelled(activations):
        sums.index_add_(0, owner, batch.x.double() * share.double()[:, None])
    return sums
