"""Stock sparse blocks of transformers, and models with them, filled with random numbers."""

from __future__ import annotations

from typing import Any

import torch
from pico_models import MOE_COMMON, PICO_MOE


def fill(module: Any) -> Any:
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            spread = 1 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            parameter.copy_(spread * torch.randn(parameter.shape, generator=draw) + (parameter.ndim == 1))
    return module.eval()


def make_model(name: str, implementation: str = "eager") -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, changes = PICO_MOE[name]
    config = AutoConfig.for_model(model_type, **{**MOE_COMMON, "vocab_size": 64, **changes})
    config._experts_implementation = implementation
    return fill(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def make_block(
    experts: int = 6, top_k: int = 2, hidden: int = 20, width: int = 12, shared: int = 28, normalized: bool = True
) -> Any:
    """A Qwen2-MoE block; without a shared expert, one of Qwen3-MoE."""
    from transformers import Qwen2MoeConfig, Qwen3MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    kind, configured = (Qwen2MoeSparseMoeBlock, Qwen2MoeConfig) if shared else (Qwen3MoeSparseMoeBlock, Qwen3MoeConfig)
    config = configured(
        hidden_size=hidden,
        moe_intermediate_size=width,
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=normalized,
        **({"shared_expert_intermediate_size": shared} if shared else {}),
    )
    config._experts_implementation = "eager"
    return fill(kind(config))


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))
