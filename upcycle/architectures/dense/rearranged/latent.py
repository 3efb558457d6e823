"""The base of families with multi-head latent attention (MLA): keys and values are read off one short vector per token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from upcycle.architectures.dense.base import DenseConfig, Family, Feature
from upcycle.files.formats.settings import FLAG, SIZE


class LatentFamily(Family):
    """Describes DeepSeek's attention: ``attention_bias`` puts biases on the first projections and on the output projection.

    ``latent_defaults`` are the defaults of its sizes. The rotated part of a head is what the stock class calls ``head_dim``.
    """

    targets = ("deepseek_v3",)
    latent_defaults: ClassVar[Mapping[str, Any]]
    rope_interleave: ClassVar[bool | None] = (
        None  # the default of the key; None: the class does not know it, and rotates halves
    )
    keys = {
        "attention_bias": FLAG,
        "kv_lora_rank": SIZE,
        "q_lora_rank": SIZE.optional,
        "qk_nope_head_dim": SIZE,
        "qk_rope_head_dim": SIZE,
        "v_head_dim": SIZE,
    }

    def values(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values; ``head_dim`` is not read, as the stock class sets it."""
        rotated = raw.get("qk_rope_head_dim", self.latent_defaults["qk_rope_head_dim"])
        return {**super().values(raw), "head_dim": rotated}

    def details(self, raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the sizes of the attention and its biases."""
        sizes = {key: raw.get(key, default) for key, default in self.latent_defaults.items()}
        if sizes["v_head_dim"] is None:
            sizes["v_head_dim"] = values["hidden_size"] // values["num_attention_heads"]
        pairs = False if self.rope_interleave is None else bool(raw.get("rope_interleave", self.rope_interleave))
        bias = bool(raw.get("attention_bias"))
        return {
            "qkv_bias": bias,
            "output_bias": bias,
            "special": frozenset({Feature.LATENT_ATTENTION}),
            "extra": {**sizes, "rope_interleave": pairs},
        }

    def layer_specs(self, config: DenseConfig, layer: int) -> dict[str, tuple[int, ...]]:
        """Return the layer's two norms, and its latent attention."""
        d, heads, sizes = config.hidden_size, config.num_attention_heads, config.extra
        rank, latent, rotated = sizes["q_lora_rank"], sizes["kv_lora_rank"], sizes["qk_rope_head_dim"]
        queries = heads * (sizes["qk_nope_head_dim"] + rotated)
        outputs = heads * sizes["v_head_dim"]
        shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,)}
        first = {"kv_a_proj_with_mqa": (latent + rotated, d), "o_proj": (d, outputs)}
        if rank is None:
            shapes["self_attn.q_proj.weight"] = (queries, d)
        else:
            first["q_a_proj"] = (rank, d)
            shapes |= {"self_attn.q_a_layernorm.weight": (rank,), "self_attn.q_b_proj.weight": (queries, rank)}
        for part, shape in first.items():
            shapes[f"self_attn.{part}.weight"] = shape
            if config.qkv_bias:
                shapes[f"self_attn.{part}.bias"] = shape[:1]
        shapes["self_attn.kv_a_layernorm.weight"] = (latent,)
        shapes["self_attn.kv_b_proj.weight"] = (heads * sizes["qk_nope_head_dim"] + outputs, latent)
        return {f"{self.module_paths.layer(layer)}.{name}": shape for name, shape in shapes.items()}
