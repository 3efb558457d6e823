"""Phi-3, Phi-3.5-mini and Phi-4: Llama's block with fused projections, partial rotary embeddings in Phi-4-mini."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.architectures.dense.rearranged.fused import FusedFamily
from upcycle.errors import CheckpointError
from upcycle.files.formats.settings import PART, SIZE

_LENGTH = "original_max_position_embeddings"


class Phi3(FusedFamily):
    """Describes Phi-3: ``qkv_proj`` holds q, k and v, and ``gate_up_proj`` holds gate and up, one below the other.

    ``original_max_position_embeddings`` stands beside the rope's description, and is the length at which ``longrope`` switches.
    """

    name = "phi3"
    title = "Phi-3, Phi-3.5, Phi-4"
    targets = ("mixtral", "qwen2_moe", "glm4_moe")
    fused = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    partial_rotary_factor = 1.0
    defaults = {
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-05,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
    }
    keys = {"sliding_window": SIZE.optional, "partial_rotary_factor": PART, _LENGTH: SIZE}
    token_defaults = {"bos_token_id": 1, "eos_token_id": 32000, "pad_token_id": 32000}

    def details(self, raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the length with which the rope was trained."""
        return {"extra": {_LENGTH: raw.get(_LENGTH, 4096)}}

    def rope(self, raw: Mapping[str, Any], values: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Return the rope as the stock class reads it: with older names of ``longrope``, and no other scaling.

        Raises:
            CheckpointError: the rope has another scaling.
        """
        settings = {_LENGTH: 4096, **raw}
        for key in ("rope_scaling", "rope_parameters"):
            described = settings.get(key) or {}
            if (described.get("rope_type") or described.get("type")) in ("su", "yarn"):
                settings[key] = {**described, "rope_type": "longrope"}
        rope = super().rope(settings, values, where)
        if rope["rope_type"] not in ("default", "longrope"):
            raise CheckpointError(
                f"{where}: 'rope_type' of a phi3 model must be default or longrope, got '{rope['rope_type']}'",
                hint="correct 'rope_parameters' (or 'rope_scaling')",
            )
        return rope

    def windows(self, raw: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
        """Return the same window for every layer, or none."""
        return (raw.get("sliding_window"),) * layers
