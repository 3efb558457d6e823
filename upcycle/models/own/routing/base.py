"""What a routing rule is: a function from a router's logits to experts and their weights. T tokens, E experts, K slots."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch

if TYPE_CHECKING:
    from typing_extensions import Self


class RoutedTokens(NamedTuple):
    """The experts of every token. Shapes do not depend on values, so that compilers can look through it."""

    experts: torch.Tensor
    """int64 ``[T, K]``; the id E stands for no expert."""
    weights: torch.Tensor
    """``[T, K]`` like the logits: what each expert's output is multiplied by. Where there is no expert, 0."""


class RouterRule(ABC):
    """A rule, with its parameters as the fields of a frozen dataclass.

    Attributes:
        name: by which ``config.json`` names it.
        title: in prose.
        paper: the URL of the paper that it is from.
        per_token: whether a token's experts depend on that token alone: no other one, earlier or later, changes them. A model that
            writes token by token needs that.
        router_bias: what a new router's logits begin with, where the rule needs a bias; None: it needs none.
        predicts_choice: whether the router has a second matrix, which predicts whether experts would choose the token.
        compares_norms: whether the rule is for logits that are predicted norms of the experts' outputs.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    per_token: ClassVar[bool] = True
    router_bias: ClassVar[float | None] = None
    predicts_choice: ClassVar[bool] = False
    compares_norms: ClassVar[bool] = False

    @abstractmethod
    def sums_to_one(self, experts: int) -> bool:
        """Return whether a token's weights sum to 1 whatever the logits of so many experts are."""

    @abstractmethod
    def route(self, logits: torch.Tensor) -> RoutedTokens:
        """Return the experts and weights for logits ``[T, E]`` in fp32 or fp64."""

    def route_sequences(self, logits: torch.Tensor, length: int, real: torch.Tensor | None = None) -> RoutedTokens:
        """Return the experts and weights for logits ``[T, E]`` of whole sequences, one behind the other.

        Args:
            logits: as of :meth:`route`.
            length: tokens of each sequence; it divides T.
            real: ``[T]``, nonzero at tokens that are no padding; None: none is. Only rules that are not ``per_token`` look at it.
        """
        return self.route(logits)

    @abstractmethod
    def equal_weight(self, experts: int) -> float:
        """Return what an expert that runs weighs where all logits are equal (and ``router_bias``, if there is one)."""

    @abstractmethod
    def all_alike(self, experts: int, equal_logits: bool) -> bool:
        """Return whether every expert runs for every token, at :meth:`equal_weight`.

        Args:
            experts: E.
            equal_logits: whether the logits of every token are equal; else they may be anything.
        """

    @property
    @abstractmethod
    def says(self) -> str:
        """Which experts run, in words that follow *the experts that run are*."""

    def gates(self, logits: torch.Tensor) -> torch.Tensor:
        """Return every expert's weight, ``[T, E]``, for logits ``[T, E]``; 0 where it does not run."""
        routed, experts = self.route(logits), logits.shape[1]
        every = torch.zeros(len(logits), experts + 1, dtype=routed.weights.dtype, device=logits.device)
        return every.scatter(1, routed.experts, routed.weights)[:, :experts]

    def check(self, experts: int) -> str | None:
        """Return what is wrong with the parameters for this number of experts; None: nothing."""
        return None

    def most_experts(self, experts: int) -> int:
        """Return how many of the experts a token has at most."""
        return experts

    def mean_experts(self, experts: int) -> float:
        """Return how many of the experts a token has in the mean, where the rule fixes that; else the most that it has."""
        return self.most_experts(experts)

    @classmethod
    def of(cls, parameters: dict[str, Any]) -> Self:
        """Build the rule of parameters by name; those left out have their defaults.

        Raises:
            ValueError: a parameter is unknown, or its value is not possible; the message names it.
        """
        known = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
        if odd := sorted(set(parameters) - set(known)):
            raise ValueError(f"'{odd[0]}' is no parameter of the rule {cls.name}: it has {', '.join(known)}")
        return cls(**parameters)


def weighted(scores: torch.Tensor, active: torch.Tensor) -> RoutedTokens:
    """Return every expert that is ``active`` ``[T, E]`` with its weight in ``scores`` ``[T, E]``, in the order of their ids."""
    experts = scores.shape[1]
    ids = torch.arange(experts, device=scores.device).expand_as(scores)
    return RoutedTokens(ids.masked_fill(~active, experts), scores.masked_fill(~active, 0.0))
