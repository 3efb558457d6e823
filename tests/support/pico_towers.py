"""Pico models of parts: tiny random checkpoints of every wrapper, by stock transformers. Tests import it as ``pico_towers``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pico_models import COMMON, PICO
from safetensors.torch import load_file, save_file

from upcycle.files.locate import DEMO_FOLDER

IMAGE = 4090  # the token of images, or of sounds; the ids after it are those of videos and of what stands around images
_NUMBERS = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
_SIGLIP = {**_NUMBERS, "image_size": 16, "patch_size": 4}
_CLIP = {"model_type": "clip_vision_model", **_SIGLIP, "num_hidden_layers": 3, "projection_dim": 16}
_PIXTRAL = {"model_type": "pixtral", **_NUMBERS, "image_size": 32, "patch_size": 4, "head_dim": 8}
_SOUND = {"num_mel_bins": 8, "max_source_positions": 32, "vocab_size": 99}
_QWEN = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_heads": 4,
    "patch_size": 4,
    "out_hidden_size": 32,
    "num_position_embeddings": 64,
}
_QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": 4091,
    "vision_start_token_id": 4092,
    "vision_end_token_id": 4093,
}
_TILES = {"image_token_index": IMAGE, "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]]}
_DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
_MROPE = {**_DEFAULT, "mrope_interleaved": True}
# model_type -> what its config.json has beside the text model
PARTS: dict[str, dict[str, Any]] = {
    "llava": {"vision_config": _CLIP, "image_token_index": IMAGE},
    "llava_next": {"vision_config": _CLIP, **_TILES},
    "llava_next_video": {"vision_config": _CLIP, "video_token_index": 4091, **_TILES},
    "llava_onevision": {
        "vision_config": {"model_type": "siglip_vision_model", **_SIGLIP},
        "video_token_index": 4091,
        **_TILES,
    },
    "vipllava": {"vision_config": _CLIP, "image_token_index": IMAGE, "vision_feature_layers": [-2, -1]},
    "mistral3": {"vision_config": _PIXTRAL, "image_token_index": IMAGE, "spatial_merge_size": 2},
    "lighton_ocr": {"vision_config": _PIXTRAL, "image_token_id": IMAGE, "spatial_merge_size": 2},
    "internvl": {
        "vision_config": {"model_type": "internvl_vision", **_NUMBERS, "image_size": [16, 16], "patch_size": [4, 4]},
        "image_token_id": IMAGE,
        "downsample_ratio": 0.5,
    },
    "idefics2": {
        "vision_config": {"model_type": "idefics2_vision", **_SIGLIP},
        "image_token_id": IMAGE,
        "perceiver_config": {
            "hidden_size": 32,
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 8,
            "num_key_value_heads": 2,
        },
    },
    "idefics3": {
        "vision_config": {"model_type": "idefics3_vision", **_SIGLIP},
        "image_token_id": IMAGE,
        "scale_factor": 2,
    },
    "smolvlm": {
        "vision_config": {"model_type": "smolvlm_vision", **_SIGLIP},
        "image_token_id": IMAGE,
        "scale_factor": 2,
    },
    "aya_vision": {
        "vision_config": {"model_type": "siglip_vision_model", **_SIGLIP},
        "image_token_index": IMAGE,
        "downsample_factor": 2,
    },
    "cohere2_vision": {
        "vision_config": {"model_type": "siglip_vision_model", **_SIGLIP},
        "image_token_id": IMAGE,
        "downsample_factor": 2,
    },
    "got_ocr2": {
        "vision_config": {
            "hidden_size": 32,
            "output_channels": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 64,
            "patch_size": 4,
            "mlp_dim": 40,
            "window_size": 4,
            "global_attn_indexes": [1],
        },
        "image_token_index": IMAGE,
    },
    "ovis2": {
        "vision_config": {**_SIGLIP, "vocab_size": 20, "hidden_stride": 1, "num_visual_indicator_tokens": 5},
        "image_token_id": IMAGE,
        "hidden_size": 32,
        "vocab_size": 4096,
        "visual_indicator_token_ids": [4080, 4081, 4082, 4083, 4084],
    },
    "lfm2_vl": {
        "vision_config": {"model_type": "siglip2_vision_model", **_NUMBERS, "num_patches": 16, "patch_size": 4},
        "image_token_id": IMAGE,
        "downsample_factor": 2,
    },
    "voxtral": {
        "audio_config": {"model_type": "voxtral_encoder", **_NUMBERS, "intermediate_size": 128, **_SOUND},
        "audio_token_id": IMAGE,
    },
    "glmasr": {
        "audio_config": {
            "model_type": "glmasr_encoder",
            **_NUMBERS,
            "intermediate_size": 128,
            "num_mel_bins": 8,
            "max_position_embeddings": 32,
        },
        "audio_token_id": IMAGE,
    },
    "qwen2_5_vl": {
        "vision_config": {**_QWEN, "depth": 4, "window_size": 16, "fullatt_block_indexes": [1, 3]},
        **_QWEN_TOKENS,
    },
    "qwen3_vl": {"vision_config": {**_QWEN, "deepstack_visual_indexes": [0, 1, 2]}, **_QWEN_TOKENS},
    "qwen3_5": {"vision_config": _QWEN, **_QWEN_TOKENS},
    "gemma4": {
        "vision_config": {
            **_NUMBERS,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "position_embedding_size": 64,
        },
        "audio_config": None,
        "image_token_id": IMAGE,
        "video_token_id": 4091,
        "audio_token_id": 4092,
        "boi_token_id": 4093,
        "eoi_token_id": 4094,
    },
    "gemma3": {
        "vision_config": {"model_type": "siglip_vision_model", **_SIGLIP},
        "image_token_index": IMAGE,
        "mm_tokens_per_image": 4,
        "boi_token_index": 4091,
        "eoi_token_index": 4092,
    },
}
# Text models that are met in one wrapper only: name -> (model_type, what differs from COMMON)
_OWN_TEXT: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2.5-vl": ("qwen2_5_vl_text", {"rope_parameters": {**_DEFAULT, "mrope_section": [1, 2, 1]}}),
    "qwen2.5-vl-mrope": (
        "qwen2_5_vl_text",
        {"rope_parameters": {"type": "mrope", "rope_theta": 5000.0, "mrope_section": [2, 1, 1]}},
    ),
    "qwen3-vl": ("qwen3_vl_text", {"head_dim": 16, "rope_parameters": {**_MROPE, "mrope_section": [3, 3, 2]}}),
    "qwen3-vl-bias": (
        "qwen3_vl_text",
        {"head_dim": 16, "attention_bias": True, "rope_parameters": {**_MROPE, "mrope_section": [3, 3, 2]}},
    ),
    "qwen3.5-vl": (
        "qwen3_5_text",
        {
            **PICO["qwen3.5"][1],
            "rope_parameters": {**_MROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5},
        },
    ),
}
_OWN_TEXT["gemma2"] = ("gemma2", {"head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 5.0})
_OWN_TEXT["gpt2"] = ("gpt2", {"n_embd": 40, "n_layer": 2, "n_head": 4, "n_inner": 96, "n_positions": 128})
_OWN_TEXT["gemma3"] = (
    "gemma3_text",
    {
        "num_hidden_layers": 3,
        "head_dim": 8,
        "query_pre_attn_scalar": 12,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "tie_word_embeddings": True,
    },
)
_OWN_TEXT["gemma3-full"] = (
    "gemma3_text",
    {
        **_OWN_TEXT["gemma3"][1],
        "layer_types": ["full_attention"] * 3,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "tie_word_embeddings": False,
    },
)
_GEMMA4 = {
    "pad_token_id": 0,
    "head_dim": 8,
    "global_head_dim": 16,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "tie_word_embeddings": True,
    "final_logit_softcapping": 30.0,
    "hidden_size_per_layer_input": 0,
}
_OWN_TEXT["gemma4"] = ("gemma4_text", {**_GEMMA4, "use_bidirectional_attention": "vision"})
_OWN_TEXT["gemma4-embedded"] = (
    "gemma4_text",
    {**_GEMMA4, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 4096},
)
# Every wrapper with two text models: those of its releases first.
CASES: tuple[tuple[str, str], ...] = (
    ("llava", "llama"),
    ("llava", "gemma"),
    ("llava_next", "mistral"),
    ("llava_next", "qwen2"),
    ("llava_next_video", "llama"),
    ("llava_next_video", "mistral-window"),
    ("llava_onevision", "qwen2"),
    ("llava_onevision", "qwen3"),
    ("vipllava", "llama"),
    ("vipllava", "phi3"),
    ("mistral3", "mistral"),
    ("mistral3", "granite-plain"),
    ("lighton_ocr", "qwen3"),
    ("lighton_ocr", "ernie4.5"),
    ("internvl", "qwen2"),
    ("internvl", "llama-rope"),
    ("idefics2", "mistral"),
    ("idefics2", "olmo2"),
    ("idefics3", "llama"),
    ("idefics3", "granite"),
    ("smolvlm", "llama"),
    ("smolvlm", "qwen2"),
    ("aya_vision", "cohere2"),
    ("aya_vision", "llama"),
    ("cohere2_vision", "cohere2"),
    ("cohere2_vision", "qwen3"),
    ("got_ocr2", "qwen2"),
    ("got_ocr2", "hunyuan"),
    ("ovis2", "qwen2"),
    ("ovis2", "qwen3"),
    ("lfm2_vl", "lfm2"),
    ("lfm2_vl", "llama"),
    ("voxtral", "llama"),
    ("voxtral", "mistral"),
    ("glmasr", "llama"),
    ("glmasr", "qwen3"),
    ("qwen2_5_vl", "qwen2.5-vl"),
    ("qwen2_5_vl", "qwen2.5-vl-mrope"),
    ("qwen3_vl", "qwen3-vl"),
    ("qwen3_vl", "qwen3-vl-bias"),
    ("qwen3_5", "qwen3.5-vl"),
    ("gemma4", "gemma4"),
    ("gemma4", "gemma4-embedded"),
    ("gemma3", "gemma3"),
    ("gemma3", "gemma3-full"),
)


def tower_config(wrapper: str, text: str, **changes: Any) -> Any:
    """The stock configuration of a model of parts; ``changes`` are those of its text model."""
    from transformers import AutoConfig

    model_type, own = (_OWN_TEXT | PICO)[text]
    inner = {**COMMON, **own, "model_type": model_type, **changes}
    return AutoConfig.for_model(
        wrapper, text_config=inner, tie_word_embeddings=bool(inner.get("tie_word_embeddings")), **PARTS[wrapper]
    )


def make_tower(folder: Path, wrapper: str, text: str, **changes: Any) -> Path:
    """Save a model of parts whose every weight is random, norms included, large enough that an error shows."""
    from transformers import AutoModelForMultimodalLM

    torch.manual_seed(0)
    model = AutoModelForMultimodalLM.from_config(tower_config(wrapper, text, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            near_one = "norm" in name and "bias" not in name
            parameter.copy_(torch.rand_like(parameter) + 0.5 if near_one else torch.randn_like(parameter) * 0.2)
            if name.endswith("A_log"):
                parameter.sub_(2)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO_FOLDER / "model" / name, folder / name)
    return folder


def changed(source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a model whose tensors, by stored name, were changed."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def reconfigured(source: Path, folder: Path, **changes: Any) -> Path:
    """A copy of a model with other values in ``config.json``; those in ``text_config`` are merged into it."""
    shutil.copytree(source, folder)
    raw = json.loads((folder / "config.json").read_text())
    raw["text_config"] |= changes.pop("text_config", {})
    (folder / "config.json").write_text(json.dumps(raw | changes))
    return folder
