"""Makes the record of the text that a result was calibrated on, and puts what the model wrote itself into words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from upcycle.files.records import hash_tokens
from upcycle.recipe.conversion_recipe import Recipe
from upcycle.text.reading.plain_text import SELF_WRITTEN

if TYPE_CHECKING:
    from collections.abc import Mapping

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


def own_text_in(record: Mapping[str, Any]) -> str:
    """Return how many windows of a calibration the model wrote itself, and how, in words; empty where it wrote none.

    Args:
        record: the ``calibration`` part of ``upcycle.json``.
    """
    if SELF_WRITTEN not in (record.get("text") or []):
        return ""
    written = record.get("written")
    if not isinstance(written, dict):  # from a blueprint, or edited
        return "text the model wrote itself"
    return (
        f"text the model wrote itself ({written.get('windows')} windows of {written.get('window')} tokens, from a "
        f"{written.get('first')}, sampled at temperature {written.get('temperature')}, seed {written.get('seed')})"
    )
