"""GPT-NeoX in its sequential form (RedPajama-INCITE, StableLM alpha): fused projections, an FFN without a gate, biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.architectures.dense.base import DenseConfig
from upcycle.architectures.dense.layer_norm.base import LayerNormFamily
from upcycle.architectures.module_paths import ModulePaths
from upcycle.architectures.tensor_origin import Origin
from upcycle.files.formats.settings import FLAG, FRACTION, PART, POSITIVE

_FUSED = {"q_proj": 0, "k_proj": 1, "v_proj": 2}


class GptNeoX(LayerNormFamily):
    """Describes GPT-NeoX: ``query_key_value`` holds q, k and v of one head after the other.

    Two keys of the rotary embedding have names of their own, ``rotary_pct`` and ``rotary_emb_base``; the usual ones are not read
    outside ``rope_parameters``.
    """

    name, title = "gpt_neox", "GPT-NeoX (sequential)"
    gated = False
    ffn_modules = {"up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"}
    aliases = {"rms_norm_eps": "layer_norm_eps"}
    module_paths = ModulePaths(
        body="gpt_neox",
        layers="gpt_neox.layers",
        embedding="gpt_neox.embed_in",
        final_norm="gpt_neox.final_layer_norm",
        stored_head="embed_out",
    )
    unread = ("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")
    partial_rotary_factor = 0.25
    must_divide = parallel = True
    defaults = {
        "vocab_size": 50432,
        "hidden_size": 6144,
        "intermediate_size": 24576,
        "num_hidden_layers": 44,
        "num_attention_heads": 64,
        "num_key_value_heads": None,
        "hidden_act": "gelu",
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
    }
    keys = {
        "attention_bias": FLAG,
        "use_parallel_residual": FLAG,
        "rotary_pct": PART,
        "rotary_emb_base": POSITIVE,
        "hidden_dropout": FRACTION,
        "classifier_dropout": FRACTION,
        "is_decoder": FLAG,
    }
    token_defaults = {"bos_token_id": 0, "eos_token_id": 2}

    def values(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values; every query has its own key and value, whatever the file says."""
        return {**super().values(raw), "num_key_value_heads": None}

    def details(self, raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the biases: the FFN always has them, attention by ``attention_bias``."""
        bias = bool(raw.get("attention_bias", True))
        return {**super().details(raw, values), "qkv_bias": bias, "output_bias": bias, "mlp_bias": True}

    def rope(self, raw: Mapping[str, Any], values: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Return the description of the rotary embedding, from the names that the stock class reads."""
        own = {"rope_theta": raw.get("rotary_emb_base"), "partial_rotary_factor": raw.get("rotary_pct")}
        return super().rope({**raw, **own}, values, where)

    def stored_specs(self, config: DenseConfig, layer: int | None) -> dict[str, tuple[int, ...]]:
        """Return the stored names and shapes, with one fused tensor in place of three."""
        fused: dict[str, tuple[int, ...]] = {}
        for name, shape in super().stored_specs(config, layer).items():
            stored = self.origin(config, name).name
            rows = fused.get(stored, (0,))[0]
            fused[stored] = (rows + shape[0], *shape[1:])
        return fused

    def origin(self, config: DenseConfig, name: str) -> Origin:
        """Return the rows of the fused tensor that hold a part, or the tensor of the same name."""
        prefix, _, part = name.rpartition("self_attn.")
        module, _, kind = part.partition(".")
        if module == "o_proj":
            return Origin(f"{prefix}attention.dense.{kind}")
        if module not in _FUSED:
            return Origin(name)
        first, head = _FUSED[module] * config.head_dim, config.head_dim
        rows = tuple(range(first, first + head))
        return Origin(f"{prefix}attention.query_key_value.{kind}", order=rows, head=3 * head)
