"""The base classes of methods whose experts are copies of the dense FFN or of pieces of it."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from pydantic import Field

from upcycle.errors import UsageError
from upcycle.ffn.blueprint import Draws
from upcycle.ffn.moe_shape import MoeShape
from upcycle.methods.base import Method, Scale
from upcycle.plugins import PluginParameters


class CopiesParameters(PluginParameters):
    """Parameters that all methods of copies have."""

    gate: Literal["normalized", "softmax"] = Field(
        "normalized",
        description="normalized: the chosen experts' weights sum to 1, which keeps the function; softmax: they stay as the "
        "softmax over all experts gives them, which language models trained better with (NVIDIA, Sparse Upcycling)",
    )


class Copies(Method):
    """Makes experts that repeat neurons. Weights that sum to 1 average the chosen experts, so a plain sum has no meaning.

    With ``gate=softmax`` the chosen experts weigh less than 1 together (unless all run). No factor can undo that, because the
    sum differs from token to token.
    """

    kind = "copies"
    exact_with_any_router = True
    Parameters = CopiesParameters
    parameters: CopiesParameters

    def __init__(self, parameters: CopiesParameters) -> None:
        super().__init__(parameters)
        self.normalized = parameters.gate == "normalized"

    def scale(self, convention: Scale, experts: int, top_k: int, shared: int = 0) -> float:
        """Return 1: the average of copies of the whole FFN needs no factor.

        Raises:
            UsageError: the convention is ``sum``.
        """
        if convention == "sum":
            raise UsageError(
                "--scale sum would multiply the dense output by top-k: experts that are copies are averaged, not summed",
                hint="use --scale exact",
            )
        return 1.0

    def inexact(self, shape: MoeShape, scale: float) -> str | None:
        """Name ``gate=softmax``, the one reason why plain copies differ; subclasses add their own."""
        if self.normalized or shape.top_k == shape.experts:
            return None
        return (
            f"gate=softmax: what the {shape.top_k} chosen of {shape.experts} experts weigh together differs from token to token"
            + (f", about {shape.top_k / shape.experts:.2g} before training" if scale == 1 else "")
        )

    def refuse_lost_bias(self, shape: MoeShape) -> None:
        """Refuse a down bias where the scale makes up for weights below 1 together: it multiplies neurons, and no bias is one.

        Raises:
            UsageError: the FFN has such a bias, the weights are the softmax's own, and not all experts run.
        """
        if "down" in shape.form.biases and not self.normalized and shape.top_k < shape.experts:
            raise UsageError(
                f"gate=softmax leaves about {shape.top_k / shape.experts:.2g} of this model's down bias: {self.name} scales what "
                "neurons add, and the bias belongs to none",
                hint="--param gate=normalized",
            )

    def refuse_shared(self, shared: int, why: str) -> None:
        """Refuse shared experts.

        Raises:
            UsageError: ``shared`` is not 0; the message says ``why``.
        """
        if shared:
            raise UsageError(
                f"{self.name} has no shared experts: {why}",
                hint="leave --shared out, or use --method shared_plus_routed",
            )


class WholeCopies(Copies):
    """Makes routed experts that are the whole FFN each, changed at random or not, and no shared experts.

    ``whole`` says what every expert is, for the message that refuses shared ones.
    """

    whole: ClassVar[str] = "every expert is the whole FFN"

    def __init__(self, parameters: CopiesParameters) -> None:
        super().__init__(parameters)
        self.draws = self.random_change() is not None
        self.exact_when_all_active = not self.draws

    @abstractmethod
    def random_change(self) -> str | None:
        """Return what the parameters change at random in every expert, for messages; ``None`` for plain copies."""

    def inexact(self, shape: MoeShape, scale: float) -> str | None:
        """Name the random change, or weights that do not sum to 1."""
        return self.random_change() or super().inexact(shape, scale)

    def expert_size(self, intermediate_size: int, experts: int, shared: int, pad: bool) -> int:
        """Return the dense width."""
        self.refuse_shared(shared, self.whole)
        return intermediate_size


def seeded(rng: torch.Generator, noise: float = 0.0, std: float | None = None, initializer: bool = False) -> Draws:
    """Return how one layer's random weights are drawn, with a seed from the method's generator."""
    seed = int(torch.randint(2**62, (), generator=rng))
    return Draws(seed, "initializer" if initializer else "statistics", std, noise)


def chosen_mask(count: int, chosen: int, rng: torch.Generator) -> torch.Tensor:
    """Return bool ``[count]``, true at ``chosen`` random places."""
    mask = torch.zeros(count, dtype=torch.bool)
    mask[torch.randperm(count, generator=rng)[:chosen]] = True
    return mask


def part_of(ratio: float, count: int) -> int:
    """Return ``floor(ratio * count)``, computed so that rounding cannot lose one (``0.29 * 100`` is below 29)."""
    return int(ratio * count * (1 + 1e-12))
