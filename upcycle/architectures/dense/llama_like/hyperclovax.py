"""HyperCLOVA X: Granite's block, with logits multiplied where Granite divides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.architectures.dense.llama_like.granite import MULTIPLIERS, Granite
from upcycle.architectures.dense.llama_like.llama import Llama
from upcycle.errors import RefusalError
from upcycle.files.formats.settings import DECIMAL, FLAG


class HyperClovaX(Llama):
    """Describes HyperCLOVA X without norms behind attention and FFN (``use_post_norm``, on by default)."""

    name = "hyperclovax"
    title = "HyperCLOVA X (without post-norms)"
    targets = Granite.targets
    keys = {**Llama.keys, **MULTIPLIERS, "attention_multiplier": DECIMAL.optional, "use_post_norm": FLAG}

    def details(self, raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Return Llama's biases and the multipliers; that of attention scores is one over the square root of the head unless given.

        Raises:
            RefusalError: the model norms the outputs of attention and FFN, too.
        """
        if raw.get("use_post_norm", True):
            raise RefusalError(
                "cannot convert this 'hyperclovax' model: it norms the outputs of attention and FFN, too ('use_post_norm'), and "
                "no stock MoE architecture converted here does",
                hint="models with 'use_post_norm' false are converted",
            )
        head = values["head_dim"] or values["hidden_size"] // values["num_attention_heads"]
        scale = raw.get("attention_multiplier")
        return {
            **super().details(raw, values),
            "embedding_multiplier": raw.get("embedding_multiplier", 1.0),
            "attention_multiplier": max(head, 1) ** -0.5 if scale is None else scale,
            "residual_multiplier": raw.get("residual_multiplier", 1.0),
            "logits_multiplier": raw.get("logits_scaling", 1.0),
        }
