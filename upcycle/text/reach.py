"""Says how long a text must be for a model to compute everything that depends on positions: attention windows, scaled positions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from upcycle.architectures.module_paths import text_config

MOST_WORK = (
    3e13  # most operations of a forward pass that a verification does without being asked: minutes on a few cores
)
MOST_POSITIONS = 2**31  # of a model without position embeddings, whose configuration has no limit
_LEAST_BEHIND, _MOST_BEHIND = 16, 256
_JUDGED = 64  # positions after the last border whose logits are compared


@dataclass(frozen=True)
class Reach:
    """The position from which on attention windows or scaled positions matter, and the length of a text that shows it.

    Attributes:
        border: the last position up to which the model computes as if it had no windows and no scaled positions; 0 where there
            is no such border.
        length: the tokens that a text needs so that positions after the border can be compared.
    """

    border: int
    length: int

    @property
    def judged(self) -> int:
        """The number of last positions of such a text that are compared; all lie after the border."""
        return min(_JUDGED, self.length - self.border)

    def text(self, ids: torch.Tensor) -> torch.Tensor:
        """Return token ids ``[1, length]``, made from ``ids``, which are repeated if there are too few."""
        flat = ids.flatten()
        return flat.repeat(-(-self.length // len(flat)))[: self.length][None]

    def work(self, parameters: int) -> float:
        """Return the floating-point operations of a forward pass over such a text."""
        return 2.0 * parameters * self.length


def reach_of(*configs: Any) -> Reach:
    """Return the reach of models with these stock configurations: the farthest border of any, within the context of all."""
    texts = [text_config(config) for config in configs]
    contexts = sorted(
        filter(None, (getattr(config, "max_position_embeddings", None) for config in texts))
    )  # some have none
    found = [pair for config in texts for pair in _borders(config)]
    if contexts and contexts[0] < contexts[-1]:
        found = [(border, min(longest, contexts[0])) for border, longest in found if border < contexts[0]]
    border, longest = max(found, default=(0, 0))
    behind = min(max(border // 8, _LEAST_BEHIND), _MOST_BEHIND)
    return Reach(border, min(border + behind, longest) if border else 0)


def _borders(config: Any) -> Iterator[tuple[int, int]]:
    """Yield a configuration's borders, each with the length of the longest text that the model reads."""
    context = int(getattr(config, "max_position_embeddings", None) or MOST_POSITIONS)
    kinds = getattr(config, "layer_types", None)
    for key, kind in (("sliding_window", "sliding"), ("attention_chunk_size", "chunked")):
        window = getattr(config, key, None)
        used = getattr(config, f"use_{key}", True) is not False
        if isinstance(window, int) and 0 < window < context and used and (not kinds or any(kind in k for k in kinds)):
            yield window, context
    rope = getattr(config, "rope_parameters", None) or {}
    each = [value for value in rope.values() if isinstance(value, Mapping)] or [rope]
    for values in each:  # settings per kind of layer, or one for all
        scaling = values.get("rope_type") or "default"
        original = values.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        if scaling == "dynamic":  # scales positions only in texts longer than the model's context
            yield context, 2 * context
        elif scaling != "default" and isinstance(original, int) and 0 < original < context:
            yield original, context
