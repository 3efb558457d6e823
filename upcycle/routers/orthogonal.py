"""Orthogonal router: random rows at right angles."""

from __future__ import annotations

import torch
from pydantic import Field

from upcycle.errors import UsageError
from upcycle.ffn.activations import Activations
from upcycle.ffn.blueprint import LayerBlueprint
from upcycle.ffn.feed_forward import FeedForward
from upcycle.plugins import PluginParameters
from upcycle.routers.base import LinearRouter


class OrthogonalParameters(PluginParameters):
    """Parameters of :class:`OrthogonalRouter`."""

    length: float = Field(1.0, gt=0, allow_inf_nan=False, description="length of every row")


class OrthogonalRouter(LinearRouter):
    """Orthonormal rows times ``length``: the Q of a normal matrix, with signs that make it uniformly distributed.

    No expert's logit says anything about another's, and the rows' condition number is 1. No paper of its own: mergekit's users
    asked for it (pull request 664).
    """

    name = "orthogonal"
    title = "Orthonormal rows"
    paper = None
    Parameters = OrthogonalParameters
    parameters: OrthogonalParameters

    def rows(
        self,
        blueprint: LayerBlueprint,
        ffn: FeedForward,
        rng: torch.Generator,
        activations: Activations | None = None,
    ) -> torch.Tensor:
        """Return the rows, fp32 ``[E, d]``.

        Raises:
            UsageError: there are more experts than dimensions.
        """
        experts, width = len(blueprint.routed), ffn.hidden_size
        if experts > width:
            raise UsageError(
                f"{experts} rows of {width} numbers cannot all be orthogonal", hint="--router random, or fewer experts"
            )
        q, r = torch.linalg.qr(torch.randn(width, experts, generator=rng, dtype=torch.float64))
        rows: torch.Tensor = (q * r.diagonal().sign()).T * self.parameters.length
        return rows.float()
