"""The keys of a ``config.json`` by the names that most architectures give them: GPT-2 says ``n_layer`` for ``num_hidden_layers``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def usual_keys(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the text model's keys of a ``config.json``, and those that have a name of their own by the usual name, too.

    A wrapped model's ``num_experts_per_tok`` is what its routers' rules say, where they all say the same.
    """
    text: Mapping[str, Any] = raw.get("text_config") or raw
    found = {usual: text[own] for usual, own in _own_names(text).items() if own in text}
    chosen = {entry["routing"].get("top_k") for entry in text.get("replaced_ffns") or ()}
    if len(chosen) == 1 and None not in chosen:
        found["num_experts_per_tok"] = chosen.pop()
    return {**found, **text}


def own_key(raw: Mapping[str, Any], usual: str) -> str:
    """Return the name that a ``config.json`` without parts has for a usual key."""
    return _own_names(raw).get(usual, usual)


def _own_names(raw: Mapping[str, Any]) -> dict[str, str]:
    from transformers import CONFIG_MAPPING

    kind = raw.get("base_model_type") or raw.get("model_type")
    return dict(CONFIG_MAPPING[kind].attribute_map) if isinstance(kind, str) and kind in CONFIG_MAPPING else {}
