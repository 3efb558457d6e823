"""OLMo 1: Llama's block with LayerNorms that have neither weights nor biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.architectures.dense.base import DenseConfig, Feature
from upcycle.architectures.dense.layer_norm.base import LayerNormFamily
from upcycle.architectures.tensor_origin import Origin
from upcycle.errors import RefusalError
from upcycle.files.formats.settings import FLAG, POSITIVE, SIZE


class Olmo(LayerNormFamily):
    """Describes OLMo 1: its norms add 1e-5 to the variance, whatever ``config.json`` says."""

    name, title = "olmo", "OLMo 1"
    targets = ("mixtral", "phimoe")
    defaults = {
        "vocab_size": 50304,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
    }
    keys = {"attention_bias": FLAG, "clip_qkv": POSITIVE.optional, "num_key_value_heads": SIZE.optional}
    token_defaults = {"pad_token_id": 1, "eos_token_id": 50279}

    def _refuse_unheld(self, raw: Mapping[str, Any], where: str) -> None:
        super()._refuse_unheld(raw, where)
        if raw.get("clip_qkv") is not None:
            raise RefusalError(
                f"{where}: 'clip_qkv' is {raw['clip_qkv']}: queries, keys and values are clipped, and no target here does that"
            )

    def values(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values; the norms' epsilon is fixed."""
        return {**super().values(raw), "rms_norm_eps": self.defaults["rms_norm_eps"]}

    def details(self, raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the biases: ``attention_bias`` puts one on all four projections."""
        bias = bool(raw.get("attention_bias"))
        special = frozenset({Feature.BARE_LAYER_NORMS})
        return {**super().details(raw, values), "qkv_bias": bias, "output_bias": bias, "special": special}

    def ffn_names(self, layer: int) -> dict[str, str]:
        """Return the names of gate, up and down alone: the norm stores nothing."""
        return {part: name for part, name in super().ffn_names(layer).items() if part != "norm"}

    def layer_specs(self, config: DenseConfig, layer: int) -> dict[str, tuple[int, ...]]:
        """Return Llama's layer without norms."""
        return _without_norms(super().layer_specs(config, layer))

    def last_specs(self, config: DenseConfig) -> dict[str, tuple[int, ...]]:
        """Return the head alone, unless it is tied."""
        return _without_norms(super().last_specs(config))

    def ffn_origins(self, config: DenseConfig, layer: int) -> dict[str, Origin]:
        """Return where gate, up and down come from, and a norm of ones."""
        origins = {part: self.origin(config, name) for part, name in self.ffn_names(layer).items()}
        ones = ((config.hidden_size,), 1.0)
        return {**origins, "norm": Origin(self.module_paths.embedding_weight, filled=ones)}


def _without_norms(specs: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in specs.items() if "norm." not in name}
