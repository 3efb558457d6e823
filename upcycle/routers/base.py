"""The protocol of a router initialiser."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from upcycle.ffn.activations import Activations
from upcycle.ffn.blueprint import LayerBlueprint
from upcycle.ffn.feed_forward import FeedForward
from upcycle.ffn.router_network import LINEAR, RouterForm, RouterNetwork
from upcycle.plugins import PluginParameters

if TYPE_CHECKING:
    from upcycle.recipe.conversion_recipe import Recipe


class Router(ABC):
    """Makes one layer's router.

    Attributes:
        equal_weights: whether all chosen experts weigh exactly 1/k.
        calibrated: whether the router must be given activations; some need them with certain parameters only.
        samples: what it reads of the recipe's sources, their prompts or texts, if it tells sources apart.
        last_token: whether only the last token of every prompt counts.
        predicts_norms: whether logits are predicted norms of the experts' outputs.
        walks: whether ``samples`` are run through the layers, and not only embedded.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str | None]
    equal_weights: ClassVar[bool] = False
    calibrated: bool = False
    samples: ClassVar[Literal["prompts", "text"] | None] = None
    last_token: bool = False
    walks: ClassVar[bool] = False
    predicts_norms: ClassVar[bool] = False
    Parameters: ClassVar[type[PluginParameters]] = PluginParameters

    def __init__(self, parameters: PluginParameters) -> None:
        self.parameters = parameters

    def check(self, experts: int, top_k: int) -> None:  # noqa: B027 - most need no check
        """Refuse numbers that the router cannot serve; most routers refuse none."""

    def check_sources(self, recipe: Recipe, members: Sequence[int], copies: bool) -> None:  # noqa: B027
        """Refuse experts of one model, or of several; most routers take both.

        Args:
            recipe: the conversion's.
            members: indices of the mixed models (:attr:`~upcycle.methods.mixing.base.MixingMethod.members`); empty for one.
            copies: whether several experts are the same FFN, or the same chunk of it.

        Raises:
            UsageError: these experts cannot be told apart by this router.
        """

    def form(self, experts: int) -> RouterForm:
        """Return the form of what :meth:`network` makes, for a number of experts: one matrix, unless a router says otherwise."""
        return LINEAR

    @abstractmethod
    def network(
        self,
        blueprint: LayerBlueprint,
        ffn: FeedForward,
        rng: torch.Generator,
        activations: Activations | None = None,
    ) -> RouterNetwork:
        """Return the router of one layer, in fp32.

        Args:
            blueprint: the layer's, without a router.
            ffn: the dense layer's FFN.
            rng: the router's random numbers for this layer.
            activations: those of ``ffn`` on the calibration text; None: there is none.

        Raises:
            UsageError: there is no text, and the router needs one.
        """


class LinearRouter(Router):
    """Makes the rows of one layer's linear router: expert i's logit for a token x is row i times x."""

    def network(
        self,
        blueprint: LayerBlueprint,
        ffn: FeedForward,
        rng: torch.Generator,
        activations: Activations | None = None,
    ) -> RouterNetwork:
        """Return :meth:`rows` as a router."""
        return RouterNetwork(self.rows(blueprint, ffn, rng, activations))

    @abstractmethod
    def rows(
        self,
        blueprint: LayerBlueprint,
        ffn: FeedForward,
        rng: torch.Generator,
        activations: Activations | None = None,
    ) -> torch.Tensor:
        """Return the rows, fp32 ``[E, d]``."""
