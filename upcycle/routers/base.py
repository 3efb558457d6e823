"""The protocol of a router initialiser."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from upcycle.ffn.activations import Activations
from upcycle.ffn.blueprint import LayerBlueprint
from upcycle.ffn.feed_forward import FeedForward
from upcycle.plugins import PluginParameters

if TYPE_CHECKING:
    from upcycle.recipe.conversion_recipe import Recipe


class Router(ABC):
    """Makes the rows of one layer's linear router: expert i's logit for a token x is row i times x.

    Attributes:
        equal_weights: whether all chosen experts weigh exactly 1/k.
        calibrated: whether the router must be given activations; some need them with certain parameters only.
        samples: what it reads of the recipe's sources, their prompts or texts, if it tells sources apart.
        last_token: whether only the last token of every prompt counts.
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

    @abstractmethod
    def rows(
        self,
        blueprint: LayerBlueprint,
        ffn: FeedForward,
        rng: torch.Generator,
        activations: Activations | None = None,
    ) -> torch.Tensor:
        """Return the rows, fp32 ``[E, d]``."""
