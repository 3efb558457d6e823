"""The K largest of a softmax at a temperature, weighed by it as it is (MoCLE)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from upcycle.models.own.routing.top_k import TopKRule

if TYPE_CHECKING:
    import torch

    from upcycle.models.own.routing.base import RoutedTokens


@dataclass(frozen=True)
class TemperedRule(TopKRule):
    """Softmax of all logits divided by a temperature, then the K largest, whose weights are not divided by their sum.

    Below a temperature of 1 the first expert weighs nearly 1 and is still taught by gradients; what it lacks to 1 may go to an expert
    for all (:class:`~upcycle.models.own.lora_block.LoraBlock`). MoCLE (arXiv 2312.12379) has K = 1.

    Attributes:
        temperature: what logits are divided by.
    """

    name, title, paper = "tempered", "top-k at a temperature", "https://arxiv.org/abs/2312.12379"

    top_k: int = 1
    scores: Literal["softmax", "sigmoid", "ones"] = "softmax"
    normalized: bool = False
    temperature: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scores != "softmax":
            raise ValueError(f"'scores' must be softmax, got {self.scores!r}")
        value = self.temperature
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise ValueError(f"'temperature' must be a positive number, got {value!r}")

    def sums_to_one(self, experts: int) -> bool:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        return self.normalized or self.top_k == experts

    @property
    def says(self) -> str:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        return f"the {self.top_k} with the largest logits, at temperature {self.temperature:g}"

    def route(self, logits: torch.Tensor) -> RoutedTokens:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        return super().route(logits / self.temperature)
