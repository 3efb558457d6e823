"""SmolLM 3: Llama's block, with layers that have no rotary position embedding (NoPE)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.architectures.dense.base import DenseConfig
from upcycle.architectures.dense.llama_like.llama import Llama
from upcycle.architectures.dense.llama_like.ministral import check_windows
from upcycle.errors import CheckpointError
from upcycle.files.formats.settings import COUNTS, FLAG, NAMES, SIZE


class SmolLm3(Llama):
    """Describes SmolLM 3: every fourth layer has no rotary embedding unless ``no_rope_layers`` (1: it has one) says otherwise.

    Layers with a window are those of ``layer_types``; without it, those without a rotary embedding, by ``use_sliding_window``.
    """

    name = "smollm3"
    title = "SmolLM 3"
    targets = ("granitemoe_swa",)
    rope_theta = 2000000.0
    defaults = {
        **Llama.defaults,
        "vocab_size": 128256,
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    }
    keys = {
        **Llama.keys,
        "layer_types": NAMES.optional,
        "no_rope_layer_interval": SIZE,
        "no_rope_layers": COUNTS.optional,
        "sliding_window": SIZE.optional,
        "use_sliding_window": FLAG,
    }
    token_defaults = {"bos_token_id": 128000, "eos_token_id": 128001, "pad_token_id": 128004}

    def _refuse_unheld(self, raw: Mapping[str, Any], where: str) -> None:
        """Accept layers without rotary embeddings, which the other families refuse."""

    def thetas(self, raw: Mapping[str, Any], layers: int, theta: float) -> tuple[float, ...]:
        """Return theta 0 for the layers without a rotary embedding."""
        return tuple(theta if rotated else 0 for rotated in _rotated(raw, layers))

    def windows(self, raw: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
        """Return the windows by ``layer_types``; without it, on the layers without a rotary embedding if there is a window."""
        window = raw.get("sliding_window")
        used = bool(raw.get("use_sliding_window")) and window is not None
        kinds = raw.get("layer_types") or [
            "sliding_attention" if used and not rotated else "full_attention" for rotated in _rotated(raw, layers)
        ]
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)

    def _check_together(self, config: DenseConfig, raw: Mapping[str, Any], where: str) -> None:
        """Refuse lists that are too short, and windows without a size.

        Raises:
            CheckpointError: as the base class, and for these.
        """
        super()._check_together(config, raw, where)
        check_windows(raw, raw.get("sliding_window"), where)
        listed = raw.get("no_rope_layers")
        if listed is not None and len(listed) < config.num_hidden_layers:
            raise CheckpointError(
                f"{where}: 'no_rope_layers' has {len(listed)} entries, 'num_hidden_layers' is {config.num_hidden_layers}",
                hint="correct the key, or download config.json again",
            )


def _rotated(raw: Mapping[str, Any], layers: int) -> list[bool]:
    """Return which layers have a rotary embedding."""
    listed, interval = raw.get("no_rope_layers"), raw.get("no_rope_layer_interval", 4)
    if listed is None:
        return [(layer + 1) % interval != 0 for layer in range(layers)]
    return [bool(rotated) for rotated in listed[:layers]]
