"""Makes the record of the text that a result was calibrated on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from upcycle.files.records import hash_tokens
from upcycle.recipe.conversion_recipe import Recipe

if TYPE_CHECKING:
    import torch


def text_record(recipe: Recipe, windows: torch.Tensor) -> dict[str, Any]:
    """Return the record of the calibration text: names, tokens that were read, and the SHA-256 of the token ids.

    Args:
        recipe: the conversion's.
        windows: the token ids ``[N, W]``.
    """
    return {
        "text": recipe.calibration.texts,
        "tokens": windows.numel(),
        "window": windows.shape[1],
        "token_ids_sha256": hash_tokens(windows),
    }
