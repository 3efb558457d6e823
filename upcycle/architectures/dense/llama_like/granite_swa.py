"""Granite with sliding windows (Granite Swash): Granite's block with windows, attention sinks, and layers without rotary embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.architectures.dense.base import DenseConfig, Feature
from upcycle.architectures.dense.llama_like.granite import MULTIPLIERS, Granite
from upcycle.errors import CheckpointError
from upcycle.files.formats.settings import FLAG, NAMES, POSITIVE, SIZE, ValueKind, is_number

_THETAS = ValueKind(
    "a list of numbers that are not negative", lambda v: isinstance(v, list) and all(is_number(n) and n >= 0 for n in v)
)


class GraniteSwa(Granite):
    """Describes Granite with windows on three of four layers, a sink in every head, and one theta per layer (0: not rotated)."""

    name = "granite_swa"
    title = "Granite with sliding windows"
    targets = ("granitemoe_swa",)
    defaults = {
        **Granite.defaults,
        "vocab_size": 100352,
        "hidden_size": 2560,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 20,
        "num_key_value_heads": 4,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": True,
    }
    keys = {
        "attention_bias": FLAG,
        "mlp_bias": FLAG,
        **MULTIPLIERS,
        "layer_rope_theta": _THETAS.optional,
        "rope_theta": POSITIVE,
        "layer_types": NAMES.optional,
        "sliding_window": SIZE,  # the stock class accepts null, and does not run with it
    }
    token_defaults = {"bos_token_id": 100257, "eos_token_id": 100257}

    def thetas(self, raw: Mapping[str, Any], layers: int, theta: float) -> tuple[float, ...]:
        """Return the thetas of ``layer_rope_theta``, if there is one."""
        return tuple((raw.get("layer_rope_theta") or ())[:layers])

    def windows(self, raw: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
        """Return the windows by ``layer_types``; without it, on every layer but the first of each four."""
        window = raw.get("sliding_window", 128)
        kinds = raw.get("layer_types") or ["sliding_attention" if i % 4 else "full_attention" for i in range(layers)]
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)

    def details(self, raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Return Granite's details, and the sinks."""
        return {**super().details(raw, values), "special": frozenset({Feature.SINKS})}

    def layer_specs(self, config: DenseConfig, layer: int) -> dict[str, tuple[int, ...]]:
        """Return Llama's layer with a sink for every head."""
        sinks = {f"{self.module_paths.layer(layer)}.self_attn.sinks": (config.num_attention_heads,)}
        return {**super().layer_specs(config, layer), **sinks}

    def _check_together(self, config: DenseConfig, raw: Mapping[str, Any], where: str) -> None:
        """Refuse a list of thetas that is too short.

        Raises:
            CheckpointError: as the base class, and for that.
        """
        super()._check_together(config, raw, where)
        listed = raw.get("layer_rope_theta")
        if listed is not None and len(listed) < config.num_hidden_layers:
            raise CheckpointError(
                f"{where}: 'layer_rope_theta' has {len(listed)} entries, 'num_hidden_layers' is {config.num_hidden_layers}",
                hint="correct the key, or download config.json again",
            )
