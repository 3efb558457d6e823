"""Mistral 7B and its relatives: Llama's block with a sliding window on every layer, or none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.architectures.dense.base import Family
from upcycle.files.formats.settings import SIZE


class Mistral(Family):
    """Describes Mistral: Llama's block with one optional sliding window."""

    name = "mistral"
    title = "Mistral"
    targets: tuple[str, ...] = ("mixtral", "qwen2_moe")
    defaults = {
        **Family.defaults,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    }
    keys = {"sliding_window": SIZE.optional}
    token_defaults = {"bos_token_id": 1, "eos_token_id": 2}

    def windows(self, raw: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
        """Return the window; as in the stock class, a missing key means 4096 and an explicit null means none."""
        return (raw.get("sliding_window", 4096),) * layers
