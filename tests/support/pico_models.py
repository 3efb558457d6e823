"""Pico models: what tiny random checkpoints of every family are configured like. Tests import it as ``pico_models``."""

from __future__ import annotations

from typing import Any

COMMON: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 32,
    "intermediate_size": 96,  # divides into 8 routed, and into 8 routed + 4 shared experts
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12}
GRANITE4: dict[str, Any] = {
    "shared_intermediate_size": 96,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "layer_types": ["attention"] * 3,
    "position_embedding_type": "rope",
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.4,
    "logits_scaling": 5.0,
    "tie_word_embeddings": True,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
}
# name -> (model_type, what differs from COMMON)
PICO: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-bias": ("llama", {"attention_bias": True}),
    "llama-rope": ("llama", {"rope_parameters": LLAMA3_ROPE, "head_dim": 16, "tie_word_embeddings": True}),
    "llama-mlp-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 16}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-bias": ("qwen3", {"head_dim": 16, "attention_bias": True}),
    "qwen3-windows": (
        "qwen3",
        {"head_dim": 16, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "qwen3.5": (
        "qwen3_5_text",
        {
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
    ),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.4,
            "logits_scaling": 5.0,
            "attention_bias": True,
        },
    ),
    "granite-plain": ("granite", {"attention_multiplier": 8**-0.5}),
    "granite4": ("granitemoehybrid", GRANITE4),
    "granite4-nope": ("granitemoehybrid", {**GRANITE4, "position_embedding_type": None}),
    "olmo2": ("olmo2", {"attention_bias": True}),
    "phi3": ("phi3", {}),
    "phi3-window": ("phi3", {"sliding_window": 16}),
    "phi3-longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.5, 2.0, 3.0],
                "long_factor": [1.0, 2.0, 4.0, 8.0],
            },
        },
    ),
    "phi3-partial": ("phi3", {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}}),
    "phi3-partial-longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "attention_factor": 1.0,
                "short_factor": [1.0, 1.5],
                "long_factor": [1.0, 4.0],
            },
        },
    ),
    "phi3-idle-window": (  # as long as the context
        "phi3",
        {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}, "sliding_window": 512},
    ),
    "phi4-mini": (  # as on the hub: older spellings, partial and longrope at once
        "phi3",
        {
            "tie_word_embeddings": True,
            "partial_rotary_factor": 0.5,
            "original_max_position_embeddings": 32,
            "rope_theta": 10000.0,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [1.0, 4.0]},
        },
    ),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma-bfloat16": ("gemma", {"head_dim": 16, "dtype": "bfloat16"}),
    "cohere2": (
        "cohere2",
        {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "ernie4.5": ("ernie4_5", {"head_dim": 16}),
    "ernie4.5-bias": ("ernie4_5", {"head_dim": 16, "use_bias": True}),
    "hunyuan": ("hunyuan_v1_dense", {"head_dim": 16, "attention_bias": True}),
    "hunyuan-alpha": (
        "hunyuan_v1_dense",
        {
            "head_dim": 16,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 1.0, "alpha": 9.0},
        },
    ),
    "seed-oss": ("seed_oss", {"head_dim": 16}),
    "seed-oss-bias": ("seed_oss", {"head_dim": 16, "attention_out_bias": True}),
    "seed-oss-every-bias": ("seed_oss", {"head_dim": 16, "attention_out_bias": True, "mlp_bias": True}),
    "helium-mlp-bias": ("helium", {"head_dim": 8, "mlp_bias": True}),
    "helium": ("helium", {"head_dim": 8}),
    "smollm3": ("smollm3", {"attention_bias": True, "no_rope_layer_interval": 2}),
    "smollm3-windows": ("smollm3", {"no_rope_layers": [0, 1, 0], "use_sliding_window": True, "sliding_window": 16}),
    "ministral": ("ministral", {"head_dim": 16, "sliding_window": 16}),
    "ministral-windows": (
        "ministral",
        {
            "head_dim": 16,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        },
    ),
    "ministral3": (
        "ministral3",
        {
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
    ),
    "granite-swa": (
        "granite_swa",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.4,
            "logits_scaling": 5.0,
            "sliding_window": 16,
            "layer_rope_theta": [10000.0, 500.0, 0],
            "attention_bias": True,
        },
    ),
    "internlm3": ("internlm3", {"head_dim": 16}),
    "internlm3-bias": ("internlm3", {"head_dim": 16, "attention_bias": True, "mlp_bias": True}),
    "arcee": ("arcee", {}),
    "arcee-bias": ("arcee", {"attention_bias": True}),
    "hyperclovax": (
        "hyperclovax",
        {
            "use_post_norm": False,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.4,
            "logits_scaling": 0.2,
            "attention_bias": True,
        },
    ),
    "glm": ("glm", {"head_dim": 16}),
    "glm-plain": ("glm", {"head_dim": 16, "attention_bias": False, "partial_rotary_factor": 0.25}),
    "cohere": ("cohere", {"attention_bias": True}),
    "youtu": ("youtu", {**LATENT, "attention_bias": True, "num_key_value_heads": 4}),
    "youtu-halves": ("youtu", {**LATENT, "q_lora_rank": None, "rope_interleave": False, "num_key_value_heads": 4}),
    "minicpm3": (
        "minicpm3",
        {
            **LATENT,
            "dim_model_base": 8,
            "num_key_value_heads": 4,
            "scale_emb": 2,
            "scale_depth": 0.5,
            "rms_norm_eps": 0.01,
        },
    ),
    "lfm2": (
        "lfm2",
        {"layer_types": ["conv", "full_attention", "conv"], "conv_bias": True, "block_auto_adjust_ff_dim": False},
    ),
    "starcoder2": ("starcoder2", {"sliding_window": 16}),
    "starcoder2-plain": ("starcoder2", {"use_bias": False, "hidden_size": 48}),  # not gated, and no down bias
    "gpt-neox": ("gpt_neox", {"use_parallel_residual": False, "hidden_size": 64}),  # a quarter of 16 is turned
    "gpt-neox-linear": (
        "gpt_neox",
        {
            "use_parallel_residual": False,
            "attention_bias": False,
            "rope_parameters": {
                "rope_type": "linear",
                "rope_theta": 10000.0,
                "factor": 2.0,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "stablelm": ("stablelm", {"use_qkv_bias": True}),
    "nemotron": ("nemotron", {"head_dim": 12}),
    "nemotron-bias": ("nemotron", {"attention_bias": True, "mlp_bias": True}),
    "jais2": ("jais2", {}),
    "olmo": ("olmo", {"tie_word_embeddings": True}),
    "olmo-bias": ("olmo", {"attention_bias": True}),
}
# Stock MoEs: name -> (model_type, what differs from MOE_COMMON and its key for four experts)
MOE_COMMON: dict[str, Any] = COMMON | {
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
}
_SIGMOID: dict[str, Any] = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "norm_topk_prob": True}
_LATENT = {**LATENT, "num_key_value_heads": 4}  # attention whose keys and values are products
_DELTA_NET = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_interleaved": True}
_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_heads": 4,
    "patch_size": 4,
    "out_hidden_size": 32,
    "num_position_embeddings": 64,
}
_VISION_TOKENS = {
    "image_token_id": 4090,
    "video_token_id": 4091,
    "vision_start_token_id": 4092,
    "vision_end_token_id": 4093,
}
# Those whose MoE is the text model of a class with other parts: what differs is inside, and the rest beside it.
MOE_PARTS: dict[str, dict[str, Any]] = {
    "qwen3_5_moe": {"vision_config": _VISION, **_VISION_TOKENS, "tie_word_embeddings": False},
    "qwen3_vl_moe": {
        "vision_config": {**_VISION, "deepstack_visual_indexes": [0]},
        **_VISION_TOKENS,
        "tie_word_embeddings": False,
    },
}
PICO_MOE: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "qwen2_moe": ("qwen2_moe", {"num_experts": 4, "norm_topk_prob": True, "mlp_only_layers": [0]}),
    "qwen2_moe-softmax": ("qwen2_moe", {"num_experts": 4, "norm_topk_prob": False}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 4, "norm_topk_prob": True}),
    "qwen3_5_moe_text": (
        "qwen3_5_moe_text",
        {"num_experts": 4, "layer_types": ["linear_attention", "full_attention"], **_DELTA_NET},
    ),
    "qwen3_5_moe": (
        "qwen3_5_moe",
        {
            "num_experts": 4,
            "layer_types": ["linear_attention", "full_attention"],
            "rope_parameters": {**_MROPE, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5},
            "shared_expert_intermediate_size": 24,
            **_DELTA_NET,
        },
    ),
    "qwen3_vl_moe": (
        "qwen3_vl_moe",
        {
            "num_experts": 4,
            "moe_intermediate_size": 24,  # with 16, gate and up together were square, and so are they behind slim
            "rope_parameters": {**_MROPE, "mrope_section": [2, 1, 1]},
        },
    ),
    "olmoe": ("olmoe", {"num_experts": 4}),
    "flex_olmo": ("flex_olmo", {"num_experts": 4}),
    "mellum": ("mellum", {"num_experts": 4}),
    "cohere2_moe": ("cohere2_moe", {"num_experts": 4, "layer_types": ["sliding_attention", "full_attention"]}),
    "cohere2_moe-sigmoid": (
        "cohere2_moe",
        {
            "num_experts": 4,
            "layer_types": ["sliding_attention", "full_attention"],
            "expert_selection_fn": "sigmoid",
            "norm_topk_prob": False,
        },
    ),
    "granitemoe": ("granitemoe", {"num_local_experts": 4}),
    "granitemoeshared": ("granitemoeshared", {"num_local_experts": 4, "shared_intermediate_size": 24}),
    "granitemoe_swa": ("granitemoe_swa", {"num_local_experts": 4, "shared_intermediate_size": 24}),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            "num_local_experts": 4,
            "shared_intermediate_size": 24,
            "layer_types": ["mamba", "attention"],
            "residual_multiplier": 0.4,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        {
            "num_local_experts": 4,
            "intermediate_size": 24,
            "swiglu_limit": 0.3,  # many are beyond
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "phimoe": ("phimoe", {"num_local_experts": 4, "intermediate_size": 24, "router_jitter_noise": 0.3}),
    "phimoe-constant": ("phimoe", {"num_local_experts": 4, "intermediate_size": 24, "router_jitter_noise": 0.0}),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {"num_experts": 4, "moe_topk": 2}),
    "lfm2_moe": ("lfm2_moe", {"num_experts": 4, "layer_types": ["conv", "full_attention"], "num_dense_layers": 0}),
    "glm4_moe": ("glm4_moe", {**_SIGMOID, "first_k_dense_replace": 1}),
    "glm4_moe-sigmoid": ("glm4_moe", {**_SIGMOID, "first_k_dense_replace": 0, "norm_topk_prob": False}),
    "dots1": ("dots1", {**_SIGMOID, "routed_scaling_factor": 1.5, "n_shared_experts": 1, "first_k_dense_replace": 0}),
    "solar_open": ("solar_open", _SIGMOID),
    "deepseek_v3": ("deepseek_v3", {**_SIGMOID, **_LATENT, "head_dim": 4, "first_k_dense_replace": 1}),
    "deepseek_v2": (
        "deepseek_v2",
        {**_SIGMOID, **_LATENT, "q_lora_rank": None, "topk_method": "greedy", "routed_scaling_factor": 1.5},
    ),
    "glm4_moe_lite": ("glm4_moe_lite", {**_SIGMOID, **_LATENT}),
    "exaone_moe": ("exaone_moe", {**_SIGMOID, "num_experts": 4, "num_shared_experts": 1, "first_k_dense_replace": 0}),
    "qwen3_next": (
        "qwen3_next",
        {
            "num_experts": 4,
            "norm_topk_prob": True,
            "shared_expert_intermediate_size": 24,
            "layer_types": ["linear_attention", "full_attention"],
            **_DELTA_NET,
        },
    ),
    "minimax_m2": ("minimax_m2", {"num_local_experts": 4, "intermediate_size": 16}),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 0},
    ),
    "ernie4_5_moe-alone": (
        "ernie4_5_moe",
        {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 0, "moe_layer_start_index": 0},
    ),
}
