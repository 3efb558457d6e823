"""The part of a training recipe that says which low-rank matrices train in the place of the weights, and what they exclude."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from upcycle.plugins import StrictSettings

WORDS = ("all", "attention", "ffn", "shared", "routed", "router")


class AdapterRecipe(StrictSettings):
    """LoRA: pairs of low-rank matrices train, and the model's own weights stay as they are."""

    rank: int = Field(16, ge=1, le=4096, description="columns of B, rows of A, of every target (of every expert)")
    alpha: float = Field(32.0, gt=0, description="the product is scaled by alpha / rank")
    rslora: bool = Field(False, description="scale it by alpha / sqrt(rank) instead")
    targets: list[str] = Field(
        default=["all"],
        min_length=1,
        description="what gets a pair: any of attention, ffn (dense FFNs), shared and routed (experts), all (these four, if the "
        "model has them), and patterns of names of linear layers with *; router: routers train themselves, whole",
    )

    @field_validator("targets")
    @classmethod
    def _known(cls, value: list[str]) -> list[str]:
        for word in value:
            if word not in WORDS and "*" not in word and "." not in word:
                raise ValueError(f"unknown target '{word}'; use {', '.join(WORDS)}, or a pattern with *")
        return value

    @property
    def scale(self) -> float:
        """What a product is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


def check_alone(recipe: Any) -> None:
    """Refuse what does not go with an adapter.

    Args:
        recipe: a whole training recipe, with its keys validated.

    Raises:
        ValueError: names the key, and why.
    """
    refused = {
        "zero.stage: 3": (recipe.zero.stage == 3, "it divides the weights that a pair is added to; use 0, 1 or 2"),
        "expert_parallel": (recipe.expert_parallel > 1, "AutoEP replaces the experts that a pair is added to"),
        "dense_states": (recipe.dense_states is not None, "they are states of whole weights"),
    }
    for stage in recipe.stages:
        refused |= {
            f"stage '{stage.name}': activation": (
                bool(stage.activation),
                "the weights that it is to suit stay as they are",
            ),
            f"stage '{stage.name}': balance": (stage.balance is not None, "its biases are no part of an adapter"),
            f"stage '{stage.name}': control.noise learned": (
                stage.control.noise == "learned",
                "its weights are no part of an adapter",
            ),
        }
    for key, (found, why) in refused.items():
        if found:
            raise ValueError(f"{key} does not go with adapter: {why}")
