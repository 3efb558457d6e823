"""The protocol of a router initialiser."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from upcycle.activations import Activations
from upcycle.blueprint import LayerBlueprint
from upcycle.feed_forward import FeedForward
from upcycle.methods.base import PluginParameters


class Router(ABC):
    """Makes the rows of one layer's linear router.

    ``equal_weights`` says that all chosen experts weigh exactly 1/k. ``calibrated`` routers must be given activations.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str | None]
    equal_weights: ClassVar[bool] = False
    calibrated: bool = False  # some only with certain parameters
    Parameters: ClassVar[type[PluginParameters]] = PluginParameters

    def __init__(self, parameters: PluginParameters) -> None:
        self.parameters = parameters

    def check(self, experts: int, top_k: int) -> None:  # noqa: B027 - most need no check
        """Refuse combinations that make no sense; most routers refuse none."""

    @abstractmethod
    def rows(
        self,
        blueprint: LayerBlueprint,
        ffn: FeedForward,
        rng: torch.Generator,
        activations: Activations | None = None,
    ) -> torch.Tensor:
        """Fp32 ``[E, d]``."""
