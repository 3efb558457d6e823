"""Ministral 8B: Mistral's block with windows on the layers that ``layer_types`` names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.architectures.dense.base import DenseConfig
from upcycle.architectures.dense.llama_like.mistral import Mistral
from upcycle.errors import CheckpointError
from upcycle.files.formats.settings import NAMES, SIZE


class Ministral(Mistral):
    """Describes Ministral: a window on every layer unless ``layer_types`` says otherwise.

    The stock class builds the mask of a window whether or not a layer has it, and the size of its heads is that of the key
    alone: it runs with neither key null.
    """

    name = "ministral"
    title = "Ministral (2024)"
    targets = ("mixtral", "qwen2_moe", "granitemoe_swa")
    keys = {"sliding_window": SIZE, "layer_types": NAMES.optional}

    def windows(self, raw: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
        """Return the windows by ``layer_types``."""
        kinds = raw.get("layer_types") or ["sliding_attention"] * layers
        return tuple(raw.get("sliding_window", 4096) if kind == "sliding_attention" else None for kind in kinds)

    def _check_together(self, config: DenseConfig, raw: Mapping[str, Any], where: str) -> None:
        """Refuse a missing ``head_dim``.

        Raises:
            CheckpointError: as the base class, and for that.
        """
        super()._check_together(config, raw, where)
        if raw.get("head_dim") is None:
            raise CheckpointError(
                f"{where}: 'head_dim' is missing, and the stock ministral class does not run without it",
                hint=f"add it: 'hidden_size' over 'num_attention_heads' is {config.head_dim}",
            )


def check_windows(raw: Mapping[str, Any], window: int | None, where: str) -> None:
    """Refuse layers with a window, by ``layer_types``, where no window is given.

    Raises:
        CheckpointError: there are such layers.
    """
    if window is None and "sliding_attention" in (raw.get("layer_types") or ()):
        raise CheckpointError(
            f"{where}: 'layer_types' has layers of sliding_attention, and 'sliding_window' is not given",
            hint="correct the keys, or download config.json again",
        )
