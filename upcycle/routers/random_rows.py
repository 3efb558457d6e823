"""Random router: independent rows."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from upcycle.ffn.activations import Activations
from upcycle.ffn.blueprint import LayerBlueprint
from upcycle.ffn.feed_forward import FeedForward
from upcycle.plugins import PluginParameters
from upcycle.routers.base import LinearRouter


class RandomParameters(PluginParameters):
    """Parameters of :class:`RandomRouter`."""

    std: float = Field(0.02, gt=0, description="standard deviation of the router's weights")
    distribution: Literal["normal", "linear"] = Field(
        "normal",
        description="normal, or linear: uniform between -1/sqrt(d) and 1/sqrt(d), as torch.nn.Linear begins; no std",
    )


class RandomRouter(LinearRouter):
    """Normal(0, std^2), as in sparse upcycling: identical experts diverge only because their router rows differ.

    ``distribution=linear`` is how a new ``torch.nn.Linear`` begins (mergekit's ``uniform_random``).
    """

    name = "random"
    title = "Random rows"
    paper = "https://arxiv.org/abs/2212.05055"
    Parameters = RandomParameters
    parameters: RandomParameters

    def rows(
        self,
        blueprint: LayerBlueprint,
        ffn: FeedForward,
        rng: torch.Generator,
        activations: Activations | None = None,
    ) -> torch.Tensor:
        """Return the rows, fp32 ``[E, d]``."""
        shape = len(blueprint.routed), ffn.hidden_size
        if self.parameters.distribution == "linear":
            bound = ffn.hidden_size**-0.5
            return torch.empty(shape).uniform_(-bound, bound, generator=rng)
        return torch.randn(shape, generator=rng) * self.parameters.std
