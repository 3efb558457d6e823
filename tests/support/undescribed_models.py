"""Tiny random models of transformers that upcycle has no description of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

_N = {"vocab_size": 96, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_PLAIN = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, **_N,
}  # fmt: skip
_IMAGE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
_BOTH = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64, "decoder_start_token_id": 3, **_N,
}  # fmt: skip
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **_N}
# model_type -> (class, configuration)
WRAPPED: dict[str, tuple[str, dict[str, Any]]] = {
    "mpt": (
        "MptForCausalLM",
        {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "expansion_ratio": 2, **_N},
    ),
    "xglm": (
        "XGLMForCausalLM",
        {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 64, **_N},
    ),
    "ctrl": ("CTRLLMHeadModel", {**_GPT, "dff": 64}),
    "codegen": ("CodeGenForCausalLM", {**_GPT, "n_inner": 64, "rotary_dim": 4}),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", {**_GPT, "n_inner": 64}),
    "biogpt": ("BioGptForCausalLM", _PLAIN),
    "persimmon": ("PersimmonForCausalLM", _PLAIN),
    "diffllama": ("DiffLlamaForCausalLM", {**_PLAIN, "num_key_value_heads": 2}),
    "data2vec-text": ("Data2VecTextForMaskedLM", _PLAIN),
    "camembert": ("CamembertForMaskedLM", _PLAIN),
    "fnet": ("FNetForMaskedLM", {**_PLAIN, "use_tpu_fourier_optimizations": False}),
    "data2vec-vision": ("Data2VecVisionForImageClassification", _IMAGE),
    "beit": ("BeitForImageClassification", _IMAGE),
    "yolos": ("YolosForObjectDetection", {**_IMAGE, "image_size": [32, 32], "num_detection_tokens": 4}),
    "m2m_100": ("M2M100ForConditionalGeneration", _BOTH),
}
_SOUND = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "conv_dim": [8, 8],
    "conv_kernel": [10, 8], "conv_stride": [16, 20], "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "vocab_size": 96, "conv_depthwise_kernel_size": 3,
}  # fmt: skip
# model_type -> (class, configuration, what its refusal says)
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "bitnet": (
        "BitNetForCausalLM",
        {**_PLAIN, "num_key_value_heads": 2},
        r"no FFN was found in a bitnet model: what 'layers\.0\.mlp\.down_proj' reads is no activation .* a norm",
    ),
    "convnextv2": (
        "ConvNextV2ForImageClassification",
        {"image_size": 32, "hidden_sizes": [32, 64], "depths": [1, 2], "num_stages": 2},
        "no FFN was found in a convnextv2 model: .* a norm, or another function, is between",
    ),
    "wav2vec2-conformer": (
        "Wav2Vec2ConformerModel",
        _SOUND,
        r"two FFNs were found in 'encoder\.layers\.0' of a wav2vec2-conformer model: 'ffn1' and 'ffn2'",
    ),
    "esm": (
        "EsmForMaskedLM",
        {**_PLAIN, "pad_token_id": 1, "mask_token_id": 4},
        r"the layer 'encoder\.layer\.0' computes what is between .* itself",
    ),
    "squeezebert": (
        "SqueezeBertForMaskedLM",
        {**_PLAIN, "embedding_size": 32},
        "no numbered layer has two projections",
    ),
}


def undescribed(model_type: str, folder: Path) -> Any:
    """Save such a model, every weight of which is random, and return it."""
    name, settings = {**WRAPPED, **{key: each[:2] for key, each in REFUSED.items()}}[model_type]
    torch.manual_seed(0)
    model = getattr(transformers, name)(transformers.AutoConfig.for_model(model_type, **settings)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.15 * torch.randn_like(weight))
    model.save_pretrained(folder)
    return model
