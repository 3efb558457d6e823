"""Zero router: every expert gets the same weight, exactly."""

from __future__ import annotations

import torch
from pydantic import Field

from upcycle.errors import UsageError
from upcycle.ffn.activations import Activations
from upcycle.ffn.blueprint import LayerBlueprint
from upcycle.ffn.feed_forward import FeedForward
from upcycle.plugins import PluginParameters
from upcycle.routers.base import LinearRouter


class ZeroParameters(PluginParameters):
    """Parameters of :class:`ZeroRouter`."""

    inference_only: bool = Field(
        False, description="allow top-k below the number of experts, as nothing will be trained"
    )
    noisy: bool = Field(
        False,
        description="allow it for training with noise on the logits (a stage's control.noise), which is how Shazeer et al. begin",
    )


class ZeroRouter(LinearRouter):
    """All rows are zero, and so are all logits.

    With k < E all tokens tie and pick the same k experts. Without noise on the logits the others never learn, so that is refused
    unless asked for; with noise it is where Shazeer et al. (arXiv 1701.06538, appendix A) start from, so that loads begin equal.
    """

    name = "zero"
    title = "Zero rows"
    paper = None  # nothing to cite: it is the trivial router
    equal_weights = True
    Parameters = ZeroParameters
    parameters: ZeroParameters

    def check(self, experts: int, top_k: int) -> None:
        """Refuse k < E unless the user says that nothing will be trained, or with noise."""
        if top_k < experts and not (self.parameters.inference_only or self.parameters.noisy):
            raise UsageError(
                f"a zero router with top-k {top_k} of {experts} sends every token to the same {top_k} experts; without noise on its "
                "logits the others never learn",
                hint="use --router cool; or --router-param noisy=true if you will train with control.noise, or "
                "inference_only=true if you will not train",
            )

    def rows(
        self,
        blueprint: LayerBlueprint,
        ffn: FeedForward,
        rng: torch.Generator,
        activations: Activations | None = None,
    ) -> torch.Tensor:
        """Return fp32 ``[E, d]`` of zeros."""
        return torch.zeros(len(blueprint.routed), ffn.hidden_size)
