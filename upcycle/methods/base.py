"""The protocol of a method: from a dense FFN to a blueprint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict

from upcycle.blueprint import ZERO_NEURON, ExpertSpec, LayerBlueprint
from upcycle.errors import UsageError
from upcycle.feed_forward import FeedForward
from upcycle.targets.base import MoeShape

SCALES = ("exact", "sum", "paper")
PREFERRED_MULTIPLE = 8
Scale = Literal["exact", "sum", "paper"]


class PluginParameters(BaseModel):
    """A plug-in's own parameters; every field has a help text."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Method(ABC):
    """Makes blueprints. Never reads or writes a file, never knows the target.

    ``exact_when_all_active`` promises that with top-k = all experts and equal router weights the layer equals the dense
    FFN; ``exact_with_any_router`` that it does with any router whose top-k weights sum to 1.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str | None]
    kind: ClassVar[Literal["copies", "partition"]]
    exact_when_all_active: ClassVar[bool] = True
    exact_with_any_router: ClassVar[bool] = False
    Parameters: ClassVar[type[PluginParameters]] = PluginParameters

    def __init__(self, parameters: PluginParameters) -> None:
        self.parameters = parameters

    @abstractmethod
    def expert_size(self, intermediate_size: int, experts: int, shared: int, pad: bool) -> int:
        """Neurons per expert.

        Raises:
            UsageError: the dense FFN cannot be divided that way.
        """

    @abstractmethod
    def scale(self, convention: Scale, experts: int, top_k: int) -> float:
        """Factor on the routed experts' down projection, for a router whose top-k weights sum to 1.

        Raises:
            UsageError: the convention has no meaning for this method.
        """

    @abstractmethod
    def blueprint(self, ffn: FeedForward, shape: MoeShape, scale: float, rng: torch.Generator) -> LayerBlueprint:
        """Decide the neurons of every expert of one layer; the router is filled in afterwards."""


class Partition(Method):
    """A splitting method: every neuron belongs to exactly one expert. Subclasses decide the order of the neurons.

    The first ``S`` pieces of that order become the shared experts, the next ``E`` the routed ones. The dense FFN is the
    unweighted sum of all pieces, hence the conventions for routers whose weights sum to 1: ``exact`` = E (expected
    output of a random choice, equal to the dense FFN at K = E), ``sum`` = K (plain sum of the chosen experts, as in
    MoEfication), ``paper`` = E/K (LLaMA-MoE, arXiv 2406.16554).
    """

    kind = "partition"

    @abstractmethod
    def order(self, size: int, ffn: FeedForward, rng: torch.Generator) -> torch.Tensor:
        """Int64 ``[size]``: a permutation of ``0..size-1``; indices from ``F`` on are zero neurons."""

    def expert_size(self, intermediate_size: int, experts: int, shared: int, pad: bool) -> int:
        """``F / (E + S)``, rounded up to a multiple of 8 when padding is allowed."""
        pieces = experts + shared
        size, rest = divmod(intermediate_size, pieces)
        if rest and not pad:
            padded = -(-intermediate_size // (pieces * PREFERRED_MULTIPLE)) * PREFERRED_MULTIPLE * pieces
            divisors = [n for n in range(2, 65) if intermediate_size % n == 0]
            raise UsageError(
                f"{intermediate_size} neurons do not divide into {experts} routed + {shared} shared = {pieces} equal experts",
                hint=f"--pad fills up to {padded} with zero neurons (exact), or choose a total of {_some(divisors)}",
            )
        if not pad:
            return size
        # Whole 16-byte lines in bfloat16, or transformers' default kernel (grouped_mm) refuses the expert.
        return -(-intermediate_size // (pieces * PREFERRED_MULTIPLE)) * PREFERRED_MULTIPLE

    def scale(self, convention: Scale, experts: int, top_k: int) -> float:
        """See the class."""
        return {"exact": float(experts), "sum": float(top_k), "paper": experts / top_k}[convention]

    def blueprint(self, ffn: FeedForward, shape: MoeShape, scale: float, rng: torch.Generator) -> LayerBlueprint:
        """Cut the order into equal pieces."""
        order = self.order((shape.experts + shape.shared) * shape.expert_size, ffn, rng)
        # The order within an expert changes nothing but how fast it is gathered.
        order = order.view(-1, shape.expert_size).sort(dim=1).values
        order = order.masked_fill(order >= ffn.intermediate_size, ZERO_NEURON)
        pieces = [ExpertSpec(piece) for piece in order]
        return LayerBlueprint(
            layer=ffn.layer,
            shared=tuple(pieces[: shape.shared]),
            routed=tuple(pieces[shape.shared :]),
            top_k=shape.top_k,
            scale=scale,
        )


def _some(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:12])) if numbers else "1"
