"""What the methods have in common whose experts are copies of the dense FFN or of its pieces."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from upcycle.errors import UsageError
from upcycle.ffn.blueprint import Draws
from upcycle.ffn.moe_shape import MoeShape
from upcycle.methods.base import Method, Scale
from upcycle.plugins import PluginParameters


class CopiesParameters(PluginParameters):
    """Parameters that all of them have."""

    gate: Literal["normalized", "softmax"] = Field(
        "normalized",
        description="normalized: the chosen experts' weights sum to 1, which keeps the function; softmax: they stay as the "
        "softmax over all experts gives them, which language models trained better with (NVIDIA, Sparse Upcycling)",
    )


class Copies(Method):
    """Experts that repeat neurons. Weights that sum to 1 average the chosen experts, so a plain sum has no meaning.

    With ``gate=softmax`` the chosen experts weigh less than 1 together (unless all run): no factor can undo that, for it
    differs from token to token.
    """

    kind = "copies"
    exact_with_any_router = True
    Parameters = CopiesParameters
    parameters: CopiesParameters

    def __init__(self, parameters: CopiesParameters) -> None:
        super().__init__(parameters)
        self.normalized = parameters.gate == "normalized"

    def scale(self, convention: Scale, experts: int, top_k: int, shared: int = 0) -> float:
        """Copies of the whole FFN weighted by a sum of 1 need no factor."""
        if convention == "sum":
            raise UsageError(
                "--scale sum would multiply the dense output by top-k: experts that are copies are averaged, not summed",
                hint="use --scale exact",
            )
        return 1.0

    def inexact(self, shape: MoeShape, scale: float) -> str | None:
        """Only the gate can make whole copies differ; subclasses add their own reasons."""
        if self.normalized or shape.top_k == shape.experts:
            return None
        return (
            f"gate=softmax: what the {shape.top_k} chosen of {shape.experts} experts weigh together differs from token to token"
            + (f", about {shape.top_k / shape.experts:.2g} before training" if scale == 1 else "")
        )

    def refuse_shared(self, shared: int, why: str) -> None:
        """Refuse shared experts.

        Raises:
            UsageError: there are some.
        """
        if shared:
            raise UsageError(
                f"{self.name} has no shared experts: {why}",
                hint="leave --shared out, or use --method shared_plus_routed",
            )


def seeded(rng: torch.Generator, noise: float = 0.0, std: float | None = None, initializer: bool = False) -> Draws:
    """The draws of one layer, with a seed from the method's generator."""
    seed = int(torch.randint(2**62, (), generator=rng))
    return Draws(seed, "initializer" if initializer else "statistics", std, noise)


def chosen_mask(count: int, chosen: int, rng: torch.Generator) -> torch.Tensor:
    """Bool ``[count]``, true at ``chosen`` random places."""
    mask = torch.zeros(count, dtype=torch.bool)
    mask[torch.randperm(count, generator=rng)[:chosen]] = True
    return mask


def part_of(ratio: float, count: int) -> int:
    """``floor(ratio * count)``, not one less where the product falls short by its rounding alone (0.29 * 100)."""
    return int(ratio * count * (1 + 1e-12))
