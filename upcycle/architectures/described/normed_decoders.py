"""Causal language models that norm what attention and FFN put out, described by their FFNs; others are in ``decoders.py``."""

from __future__ import annotations

from dataclasses import replace

from upcycle.architectures.described.ffn_place import DescribedModel, FfnPlace
from upcycle.architectures.module_paths import ModulePaths

_PATHS = ModulePaths(output_norm="post_feedforward_layernorm")
_READS_STREAM = FfnPlace("layers.{}", "mlp.up_proj", "mlp.down_proj", gate="mlp.gate_proj", whole="mlp")

GLM4 = DescribedModel(
    "glm4",
    "GLM-4 0414",
    (
        FfnPlace(
            "layers.{}",
            "mlp.gate_up_proj",
            "mlp.down_proj",
            fused="gate up",
            whole="mlp",
            norm="post_attention_layernorm",
        ),
    ),
    replace(_PATHS, output_norm="post_mlp_layernorm"),
)
EXAONE4 = DescribedModel(
    "exaone4",
    "EXAONE 4",
    (_READS_STREAM,),
    _PATHS,
    added=("post_attention_layernorm", "post_feedforward_layernorm"),
)
HYPERCLOVAX = DescribedModel(
    "hyperclovax",
    "HyperCLOVA X",
    (replace(_READS_STREAM, norm="post_attention_layernorm"),),
    replace(_PATHS, output_norm="post_norm2"),
    multipliers={"residual_multiplier": "residual_multiplier", "logits_multiplier": "logits_scaling"},
)
GEMMA4_TEXT = DescribedModel(
    "gemma4_text",
    "Gemma 4",
    (replace(_READS_STREAM, norm="pre_feedforward_layernorm", activation="hidden_activation"),),
    _PATHS,
    refused={"enable_moe_block": ((False, None), "it is a Mixture-of-Experts already")},
    pauses=True,  # its layers read embeddings of their own, and keys and values of others, or multiply what they put out
)
