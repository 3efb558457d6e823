"""What calibrated routers share: one parameter, the refusal where there is no text, and how long their rows are."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from pydantic import Field

from upcycle.errors import UsageError
from upcycle.ffn.activations import Activations
from upcycle.ffn.blueprint import LayerBlueprint
from upcycle.ffn.feed_forward import FeedForward
from upcycle.plugins import PluginParameters
from upcycle.routers.base import LinearRouter, Router
from upcycle.routers.cool import cooled

if TYPE_CHECKING:
    from upcycle.recipe.conversion_recipe import Recipe


class CalibratedParameters(PluginParameters):
    """Parameters of every :class:`CalibratedRouter`."""

    tolerance: float = Field(0.01, gt=0, lt=1, description="largest relative difference between two experts' weights")


class LayerRouter(Router):
    """A router that reads which neurons of one FFN every expert has, and mostly what these do on calibration text."""

    calibrated = True

    def check_sources(self, recipe: Recipe, members: Sequence[int], copies: bool) -> None:
        """Refuse experts of several models.

        Raises:
            UsageError: there are several.
        """
        if members:
            raise UsageError(
                f"the {self.name} router looks at which neurons of one FFN an expert has, and here are several models",
                hint="--router domain_ridge, hidden, cheap_embed, orthogonal, cool or random",
            )

    def needs_text(self) -> UsageError:
        """Return the error of a router that was given no activations."""
        return UsageError(f"the {self.name} router needs calibration text", hint="--calibration demo, or a text file")


class CalibratedRouter(LayerRouter, LinearRouter):
    """A router whose rows say which experts a token needs; all chosen ones weigh nearly the same (see ``cool``)."""

    Parameters = CalibratedParameters
    parameters: CalibratedParameters

    @abstractmethod
    def directions(
        self,
        blueprint: LayerBlueprint,
        ffn: FeedForward,
        rng: torch.Generator,
        activations: Activations | None,
    ) -> torch.Tensor:
        """Return ``[E, d]``, rows of any length: the experts with the largest ``x @ rows.T`` are chosen."""

    def rows(
        self,
        blueprint: LayerBlueprint,
        ffn: FeedForward,
        rng: torch.Generator,
        activations: Activations | None = None,
    ) -> torch.Tensor:
        """Return the rows, fp32 ``[E, d]``.

        Raises:
            UsageError: there are no activations and the router needs them.
        """
        if self.calibrated and activations is None:
            raise self.needs_text()
        rows = self.directions(blueprint, ffn, rng, activations)
        return settled(rows, blueprint, ffn, rng, self.parameters.tolerance)


def settled(
    rows: torch.Tensor, blueprint: LayerBlueprint, ffn: FeedForward, rng: torch.Generator, tolerance: float
) -> torch.Tensor:
    """Return fp32 ``[E, d]`` that choose as ``rows`` do and are as long as ``tolerance`` allows.

    The mean of all rows is subtracted: it adds the same to every logit and changes no choice and no weight, but half precision
    would spend its digits on it. Equal experts cannot be told apart; their directions are random, because rows of zeros would
    send every token to the same k experts.
    """
    rows = rows.double() - rows.double().mean(0)
    seen = rows * ffn.norm.double()
    apart = torch.cdist(seen, seen, compute_mode="donot_use_mm_for_euclid_dist").max()
    neurons = torch.stack([expert.neurons for expert in blueprint.routed]).sort(dim=1).values
    alike = bool((neurons == neurons[0]).all()) and blueprint.down is None
    if alike or apart == 0:
        return cooled(torch.randn(rows.shape, generator=rng), ffn, tolerance)
    # ``cooled`` only ever shortens. Differences far below the tolerance would vanish in a softmax in fp32, and with them
    # the choice, where a target picks the largest weights instead of the largest logits.
    return cooled((rows / apart).float(), ffn, tolerance)
