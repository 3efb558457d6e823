"""Causal language models whose block no stock MoE class holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from upcycle.architectures.described.ffn_place import DescribedModel, FfnPlace
from upcycle.architectures.module_paths import ModulePaths


def _paths(
    body: str, layers: str, embedding: str, norm: str, blocks: str = "mlp", ends: str | None = None
) -> ModulePaths:
    inside = {"layers": layers, "embedding": embedding, "final_norm": norm}
    return ModulePaths(
        body=body, **{key: f"{body}.{path}" for key, path in inside.items()}, blocks=(blocks,), ends=ends
    )


_GPT2 = _paths("transformer", "h", "wte", "ln_f")
_LLAMA = _paths("model", "layers", "embed_tokens", "norm")
_NORMED = replace(_LLAMA, output_norm="post_feedforward_layernorm")
_GATED: dict[str, Any] = {
    "layer": "layers.{}",
    "up": "mlp.up_proj",
    "gate": "mlp.gate_proj",
    "down": "mlp.down_proj",
    "whole": "mlp",
}
_4H: dict[str, Any] = {"up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"}

GPT2 = DescribedModel(
    "gpt2",
    "GPT-2",
    (
        FfnPlace(
            "h.{}",
            "mlp.c_fc",
            "mlp.c_proj",
            whole="mlp",
            norm="ln_2",
            columns=True,
            activation="activation_function",
            dropout="resid_pdrop",
        ),
    ),
    _GPT2,
)
GPT_NEO = DescribedModel(
    "gpt_neo",
    "GPT-Neo",
    (
        FfnPlace(
            "h.{}",
            "mlp.c_fc",
            "mlp.c_proj",
            whole="mlp",
            norm="ln_2",
            activation="activation_function",
            dropout="resid_dropout",
        ),
    ),
    _GPT2,
    returns_tuple=True,
)
GPTJ = DescribedModel(
    "gptj",
    "GPT-J",
    (
        FfnPlace(
            "h.{}",
            "mlp.fc_in",
            "mlp.fc_out",
            whole="mlp",
            norm="ln_1",
            activation="activation_function",
            dropout="resid_pdrop",
        ),
    ),
    _GPT2,
    returns_tuple=True,
)
GPT_NEOX = DescribedModel(
    "gpt_neox",
    "GPT-NeoX and Pythia",
    (FfnPlace("layers.{}", **_4H, whole="mlp", norm="post_attention_layernorm"),),
    _paths("gpt_neox", "layers", "embed_in", "final_layer_norm"),
)
OPT = DescribedModel(
    "opt",
    "OPT",
    (
        FfnPlace(
            "decoder.layers.{}",
            "fc1",
            "fc2",
            act="activation_fn",
            norm="final_layer_norm",
            activation="activation_function",
        ),
    ),
    _paths("model", "decoder.layers", "decoder.embed_tokens", "decoder.final_layer_norm", "fc1", "fc2"),
    refused={
        "do_layer_norm_before": (
            (True,),
            "its layers norm behind the FFN, and there is no norm behind the last one",
        ),
        "_remove_final_layer_norm": ((False,), "there is no norm behind the last layer"),
        "layer_norm_elementwise_affine": ((True,), "its norms have no weights"),
    },
)
BLOOM = DescribedModel(
    "bloom",
    "BLOOM",
    (FfnPlace("h.{}", **_4H, act="mlp.gelu_impl", norm="post_attention_layernorm", activation="=gelu_pytorch_tanh"),),
    _paths("transformer", "h", "word_embeddings", "ln_f", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    refused={"slow_but_exact": ((False,), "it multiplies by slices of its second projection")},
    returns_tuple=True,
)
PHI = DescribedModel(
    "phi",
    "Phi-1 and Phi-2",
    (FfnPlace("layers.{}", "mlp.fc1", "mlp.fc2", whole="mlp", norm="input_layernorm"),),
    _paths("model", "layers", "embed_tokens", "final_layernorm"),
)
FALCON = DescribedModel(
    "falcon",
    "Falcon",
    (
        FfnPlace(
            "h.{}",
            **_4H,
            whole="mlp",
            norm="ln_mlp|post_attention_layernorm|input_layernorm",
            activation="activation",
        ),
    ),
    _paths("transformer", "h", "word_embeddings", "ln_f"),
    returns_tuple=True,
)
GEMMA2 = DescribedModel(
    "gemma2",
    "Gemma 2",
    (FfnPlace(**_GATED, norm="pre_feedforward_layernorm", norm_add=1.0, activation="hidden_activation"),),
    _NORMED,
)
GEMMA3_TEXT = DescribedModel(
    "gemma3_text",
    "Gemma 3",
    (FfnPlace(**_GATED, norm="pre_feedforward_layernorm", norm_add=1.0, activation="hidden_activation"),),
    _NORMED,
    both_ways="use_bidirectional_attention",  # EmbeddingGemma
)
OLMO3 = DescribedModel(
    "olmo3",
    "OLMo 3",
    (FfnPlace(**_GATED),),
    _NORMED,
    added=("post_attention_layernorm", "post_feedforward_layernorm"),
)
APERTUS = DescribedModel(
    "apertus",
    "Apertus",
    (
        FfnPlace(
            "layers.{}", "mlp.up_proj", "mlp.down_proj", whole="mlp", norm="feedforward_layernorm", learned="mlp.act_fn"
        ),
    ),
    _LLAMA,
    uncalibrated="its activation has weights of its own, and calibration computes none that has",
)
