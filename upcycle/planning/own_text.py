"""Plans text that a model writes itself, to be calibrated on: which recipes may ask for it, and the memory that it takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.errors import UsageError
from upcycle.planning.cost import RESIDENT_BYTES
from upcycle.recipe.conversion_recipe import Recipe

BATCH_TOKENS = 16384  # written side by side; fixed, since the size of a batch changes how sums are rounded
_LOGIT_BYTES = 28  # of every token of the vocabulary: logits in fp32, and in fp64 with probabilities and their sums


def check_own_text(recipe: Recipe, encoder: bool = False, reads: str = "text") -> None:
    """Refuse self-written text where there are several sources (text of one of them would favour that one), and of encoders.

    Args:
        recipe: the recipe.
        encoder: whether the model is one.
        reads: what it reads; no text is written here from anything but a text.

    Raises:
        UsageError: the recipe calibrates on self-written text, and has several sources or a model that writes none.
    """
    if (encoder or reads != "text") and recipe.calibration.own:
        what = "an encoder writes none" if encoder else f"a model that reads {reads} continues none"
        raise UsageError(
            f"calibration: self is text that the model writes, and {what}",
            hint="name a file: --calibration FILE" if reads in ("text", "pairs") else "name files: --calibration NAME",
        )
    if recipe.sources and recipe.calibration.own:
        raise UsageError(
            "calibration: self is text that one model writes, and there are several sources",
            hint="name a text file of every source's kind: --calibration FILE,FILE",
        )


def rows_at_once(window: int) -> int:
    """Return how many windows of ``window`` tokens are written side by side."""
    return max(1, BATCH_TOKENS // window)


def own_text_bytes(weights: int, config: Mapping[str, Any], recipe: Recipe) -> int:
    """Return the memory in bytes of a model that writes text, in fp32 with its cache; 0 where the recipe has it write none.

    Layers with a sliding window or a linear attention keep less than is counted here.

    Args:
        weights: the number of the model's weights.
        config: its ``config.json``.
        recipe: the conversion's.
    """
    wanted = recipe.calibration
    if not wanted.own:
        return 0
    return RESIDENT_BYTES + model_bytes(weights, config, min(wanted.window, wanted.tokens), wanted.tokens)


def model_bytes(weights: int, config: Mapping[str, Any], window: int, tokens: int) -> int:
    """Return the bytes of a model that writes ``tokens`` in windows: fp32 weights, the keys and values of a batch, its logits."""
    heads = int(config["num_attention_heads"])
    size = config.get("head_dim") or int(config["hidden_size"]) // heads
    keys = 2 * int(config.get("num_key_value_heads") or heads) * int(size) * int(config["num_hidden_layers"])
    rows = min(rows_at_once(window), -(-tokens // window))
    return 4 * (weights + rows * window * keys) + rows * int(config["vocab_size"]) * _LOGIT_BYTES
