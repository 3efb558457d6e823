"""Dense families that are refused, each with what is missing, so that nobody has to find out from garbage output."""

from __future__ import annotations

_NO_ROPE_BLOCK = (
    "its block has LayerNorms with biases and an FFN that is not gated, and no stock MoE architecture has that block"
)
_PARALLEL = "its attention and FFN run in parallel, and no stock MoE architecture converted here has that block"
_MOE = "it is a Mixture-of-Experts already"

REASONS = {
    "gpt2": _NO_ROPE_BLOCK,
    "gpt_neo": _NO_ROPE_BLOCK,
    "gpt_bigcode": _NO_ROPE_BLOCK,
    "opt": _NO_ROPE_BLOCK,
    "bloom": _NO_ROPE_BLOCK,
    "starcoder2": _NO_ROPE_BLOCK,
    "stablelm": "it has LayerNorms with biases and partial rotary attention, and no stock MoE architecture has that block",
    "gpt_neox": _PARALLEL,
    "gptj": _PARALLEL,
    "falcon": _PARALLEL,
    "phi": _PARALLEL,
    "gemma2": "it soft-caps its logits and norms the FFN's output too (sandwich norms), and no stock MoE block does both",
    "gemma3": "it norms the FFN's output too (sandwich norms), and no stock MoE block does",
    "gemma3_text": "it norms the FFN's output too (sandwich norms), and no stock MoE block does",
    "smollm3": "some of its layers have no rotary position embedding (NoPE), and no stock MoE architecture can skip it",
    "olmo": "its norms have no weights, and no stock MoE architecture with normalised routing has them",
    "olmo3": "it mixes sliding windows with post-norms, and no stock MoE architecture has both",
    "exaone4": "it norms after each block, and its MoE relative norms before",
    "nemotron": "its FFN is not gated (squared ReLU), and no stock MoE architecture with rotary attention has such experts",
    "mixtral": _MOE,
    "qwen2_moe": _MOE,
    "qwen3_moe": _MOE,
    "olmoe": _MOE,
    "deepseek_v2": _MOE,
    "deepseek_v3": _MOE,
    "granitemoe": _MOE,
    "gpt_oss": _MOE,
}


def reason(model_type: str) -> str:
    """Why a family that is not registered is refused."""
    return REASONS.get(model_type, "this version has no family for it")
