"""No router: for layers without experts to choose from."""

from __future__ import annotations

import torch

from upcycle.ffn.activations import Activations
from upcycle.ffn.blueprint import LayerBlueprint
from upcycle.ffn.feed_forward import FeedForward
from upcycle.routers.base import LinearRouter


class NoRouter(LinearRouter):
    """Stands in the place of a router where every neuron runs for every token. No recipe can name it."""

    name = "none"
    title = "No router"
    paper = None  # there is nothing to cite
    equal_weights = True

    def rows(
        self,
        blueprint: LayerBlueprint,
        ffn: FeedForward,
        rng: torch.Generator,
        activations: Activations | None = None,
    ) -> torch.Tensor:
        """Return fp32 ``[0, d]``."""
        return torch.zeros(0, ffn.hidden_size)
