"""Qwen2.5-VL: Qwen2's text model with positions in three dimensions, inside the class of GLM-4.6V, whose text model may be a MoE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.architectures.dense.base import DenseConfig, Feature
from upcycle.architectures.dense.llama_like.qwen2 import Qwen2
from upcycle.architectures.moe.base import ExpertLayout, OutputTensor
from upcycle.architectures.moe.sigmoid.glm4_moe import Glm4Moe
from upcycle.architectures.towers import samples
from upcycle.architectures.towers.wrapper import Wrapper
from upcycle.ffn.moe_shape import MoeShape


class Qwen25VlText(Qwen2):
    """Describes the text model of Qwen2.5-VL: Qwen2's block. Older files call its rotary embedding ``mrope``, newer ones default."""

    name = "qwen2_5_vl_text"
    title = "Qwen2.5 in Qwen2.5-VL"
    targets = ("glm4v_moe_text",)
    defaults = {
        **Qwen2.defaults,
        "vocab_size": 152064,
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
    }
    rope_theta = 1000000.0
    token_defaults = {"bos_token_id": 151643, "eos_token_id": 151645}

    def rope(self, raw: Mapping[str, Any], values: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Return the description of the rotary embedding, whose type ``mrope`` is the default one with ``mrope_section``."""
        found = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        if "mrope" in (found.get("rope_type"), found.get("type")):
            raw = {**raw, "rope_scaling": {**found, "rope_type": "default"}}
        return super().rope(raw, values, where)

    def rewritten(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Return the configuration as it is: no causal language model has it, so that there is none to name."""
        return dict(raw)


class Glm4vMoeText(Glm4Moe):
    """GLM-4.5-MoE's router beside attention without norms on queries and keys. Experts are stored fused, in either layout."""

    name = "glm4v_moe_text"
    title = "GLM-4.5V-MoE (text)"
    architecture = "Glm46VForConditionalGeneration"
    holds = frozenset({Feature.PLAIN_QUERIES, Feature.QKV_BIAS, Feature.SHARED_EXPERTS, Feature.DENSE_FIRST})

    def config(self, dense: DenseConfig, shape: MoeShape) -> dict[str, Any]:
        """Return GLM-4.5-MoE's keys without those that this class does not know."""
        keys = super().config(dense, shape)
        return {key: value for key, value in keys.items() if key not in ("use_qk_norm", "num_nextn_predict_layers")}

    def moe_tensors(self, dense: DenseConfig, shape: MoeShape, layer: int, layout: ExpertLayout) -> list[OutputTensor]:
        """Return the router and its bias, the shared expert, then the routed experts, fused."""
        return super().moe_tensors(dense, shape, layer, "fused")


def _as_glm(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of the other parts with the names that GLM-4.6V's class has."""
    renamed = {"vision_start_token_id": "image_start_token_id", "vision_end_token_id": "image_end_token_id"}
    found = {renamed.get(key, key): value for key, value in parts.items()}
    return {**found, "vision_config": {**parts.get("vision_config", {}), "model_type": "qwen2_5_vl_vision"}}


qwen2_5_vl = Wrapper(
    "qwen2_5_vl",
    "Qwen2.5-VL",
    samples.patches,
    moe="glm46v",
    families={Qwen25VlText.name: Qwen25VlText},
    targets={Glm4vMoeText.name: Glm4vMoeText},
    typed="mm_token_type_ids",
    rewrite=_as_glm,
    remark="glm46v reads texts and images as this model does, but not videos: it gives their frames other positions",
)
