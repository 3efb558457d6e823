"""Random router: independent normal rows."""

from __future__ import annotations

import torch
from pydantic import Field

from upcycle.activations import Activations
from upcycle.blueprint import LayerBlueprint
from upcycle.feed_forward import FeedForward
from upcycle.methods.base import PluginParameters
from upcycle.routers.base import Router


class RandomParameters(PluginParameters):
    """Parameters of :class:`RandomRouter`."""

    std: float = Field(0.02, gt=0, description="standard deviation of the router's weights")


class RandomRouter(Router):
    """Normal(0, std^2), as in sparse upcycling: identical experts diverge only because their router rows differ."""

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
        """Fp32 ``[E, d]``."""
        return torch.randn(len(blueprint.routed), ffn.hidden_size, generator=rng) * self.parameters.std
