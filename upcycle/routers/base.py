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
    """Makes the rows of one layer's linear router.

    ``equal_weights`` says that all chosen experts weigh exactly 1/k. ``calibrated`` routers must be given activations,
    those with ``samples`` activations on the prompts or texts that the recipe's sources name.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str | None]
    equal_weights: ClassVar[bool] = False
    calibrated: bool = False  # some only with certain parameters
    samples: ClassVar[Literal["prompts", "text"] | None] = None
    last_token: bool = False  # the last of a prompt's tokens alone, instead of all
    walks: ClassVar[bool] = False
    Parameters: ClassVar[type[PluginParameters]] = PluginParameters

    def __init__(self, parameters: PluginParameters) -> None:
        self.parameters = parameters

    def check(self, experts: int, top_k: int) -> None:  # noqa: B027 - most need no check
        """Refuse combinations that make no sense; most routers refuse none."""

    def check_sources(self, recipe: Recipe, members: Sequence[int], copies: bool) -> None:  # noqa: B027
        """Refuse experts of one model, or of several; most routers take both.

        Args:
            recipe: the conversion's.
            members: indices of the mixed models (:attr:`~upcycle.methods.base.Method.members`); empty for one.
            copies: whether a mixed model is more than one expert, chunks apart.

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
        """Fp32 ``[E, d]``."""
