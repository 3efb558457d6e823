"""Command R (2024): Cohere2's parallel block, rotated and without windows on every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.architectures.dense.rearranged.cohere2 import Cohere2
from upcycle.errors import RefusalError
from upcycle.files.formats.settings import DECIMAL, FLAG


class Cohere(Cohere2):
    """Describes Command R; Command R+ (``use_qk_norm``) has LayerNorms on queries and keys, which no target has."""

    name = "cohere"
    title = "Cohere (Command R)"
    rope_theta = 500000.0
    keys = {"attention_bias": FLAG, "logit_scale": DECIMAL, "use_qk_norm": FLAG.optional}

    def windows(self, raw: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
        """Return no windows."""
        return (None,) * layers

    def thetas(self, raw: Mapping[str, Any], layers: int, theta: float) -> tuple[float, ...]:
        """Return nothing: every layer is rotated."""
        return ()

    def details(self, raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Return Cohere2's details.

        Raises:
            RefusalError: queries and keys are normed.
        """
        if raw.get("use_qk_norm"):
            raise RefusalError(
                "cannot convert this 'cohere' model: it has LayerNorms on queries and keys ('use_qk_norm'), and no stock MoE "
                "architecture does",
                hint="models without them are converted (Command R 35B)",
            )
        return super().details(raw, values)
