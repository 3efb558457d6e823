"""How far a text has to reach before everything that depends on positions has been seen: windows and scaled positions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

MOST_WORK = 3e13  # operations of one pass that a verification takes on by itself: minutes on a few cores
_LEAST_BEHIND, _MOST_BEHIND = 16, 256
_JUDGED = 64  # positions behind the last border whose logits are compared


@dataclass(frozen=True)
class Reach:
    """``border`` is the last position up to which a model computes as one without windows and scaled positions would; 0: there is
    no such border. ``length`` is how long a text must be to be judged behind it.
    """

    border: int
    length: int

    @property
    def judged(self) -> int:
        """How many of the last positions of such a text lie behind the border and are compared."""
        return min(_JUDGED, self.length - self.border)

    def text(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids ``[1, length]`` made of ``ids``, which are repeated where they are too short."""
        flat = ids.flatten()
        return flat.repeat(-(-self.length // len(flat)))[: self.length][None]

    def work(self, parameters: int) -> float:
        """Operations of one pass over such a text."""
        return 2.0 * parameters * self.length


def reach_of(*configs: Any) -> Reach:
    """What stock configurations say: of all of them the farthest border."""
    found = [pair for config in configs for pair in _borders(config)]
    border, longest = max(found, default=(0, 0))
    behind = min(max(border // 8, _LEAST_BEHIND), _MOST_BEHIND)
    return Reach(border, min(border + behind, longest) if border else 0)


def _borders(config: Any) -> Iterator[tuple[int, int]]:
    """Borders, each with the longest text that the model reads."""
    context = int(config.max_position_embeddings)
    kinds = getattr(config, "layer_types", None)
    for key, kind in (("sliding_window", "sliding"), ("attention_chunk_size", "chunked")):
        window = getattr(config, key, None)
        used = getattr(config, f"use_{key}", True) is not False
        if isinstance(window, int) and 0 < window < context and used and (not kinds or any(kind in k for k in kinds)):
            yield window, context
    rope = getattr(config, "rope_parameters", None) or {}
    each = [value for value in rope.values() if isinstance(value, Mapping)] or [rope]
    for values in each:  # one per kind of layer, or one
        scaling = values.get("rope_type") or "default"
        original = values.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        if scaling == "dynamic":  # scales where a text is longer than what the model was made for
            yield context, 2 * context
        elif scaling != "default" and isinstance(original, int) and 0 < original < context:
            yield original, context
