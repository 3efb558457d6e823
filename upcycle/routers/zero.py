"""Zero router: every expert gets the same weight, exactly."""

from __future__ import annotations

import torch
from pydantic import Field

from upcycle.activations import Activations
from upcycle.blueprint import LayerBlueprint
from upcycle.errors import UsageError
from upcycle.feed_forward import FeedForward
from upcycle.methods.base import PluginParameters
from upcycle.routers.base import Router


class ZeroParameters(PluginParameters):
    """Parameters of :class:`ZeroRouter`."""

    inference_only: bool = Field(
        False, description="allow top-k below the number of experts; such a model cannot train"
    )


class ZeroRouter(Router):
    """Rows of zeros. With k < E all tokens tie and pick the same k experts; the others never learn, so that is refused."""

    name = "zero"
    title = "Zero rows"
    paper = None  # nothing to cite: it is the trivial router
    equal_weights = True
    Parameters = ZeroParameters
    parameters: ZeroParameters

    def check(self, experts: int, top_k: int) -> None:
        """Refuse k < E unless the user says that nothing will be trained."""
        if top_k < experts and not self.parameters.inference_only:
            raise UsageError(
                f"a zero router with top-k {top_k} of {experts} sends every token to the same {top_k} experts; it cannot be trained",
                hint="use --router cool, or --router-param inference_only=true if nothing will be trained",
            )

    def rows(
        self,
        blueprint: LayerBlueprint,
        ffn: FeedForward,
        rng: torch.Generator,
        activations: Activations | None = None,
    ) -> torch.Tensor:
        """Fp32 ``[E, d]`` of zeros."""
        return torch.zeros(len(blueprint.routed), ffn.hidden_size)
