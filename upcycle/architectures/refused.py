"""Lists the dense families that are refused, each with the reason, so that nobody has to find out from garbage output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.files.formats.folder_contents import shortened
from upcycle.registry import TARGETS

_NO_ROPE_BLOCK = (
    "its block has LayerNorms with biases and an FFN that is not gated, and no stock MoE architecture has that block"
)
_PARALLEL = "its attention and FFN run in parallel, and no stock MoE architecture converted here has that block"
_SANDWICH = "it norms the FFN's output too (sandwich norms), and no stock MoE block does"
_MOES = (
    *(
        "deepseek_v2",
        "exaone_moe",
        "jamba",
        "jetmoe",
        "llama4",
        "llama4_text",
    ),
    *("minimax", "minimax_m2", "olmoe", "qwen3_5_moe", "qwen3_next"),
    *TARGETS,
)

_ENCODERS = (
    "bert",
    "roberta",
    "xlm-roberta",
    "distilbert",
    "deberta",
    "deberta-v2",
    "electra",
    "albert",
    "modernbert",
    "t5gemma",
)
_ENCODER_DECODERS = ("t5", "mt5", "umt5", "bart", "mbart", "pegasus", "marian", "whisper", "m2m_100", "led")

REASONS = {
    "gpt2": _NO_ROPE_BLOCK,
    "gpt_neo": _NO_ROPE_BLOCK,
    "gpt_bigcode": _NO_ROPE_BLOCK,
    "opt": _NO_ROPE_BLOCK,
    "bloom": _NO_ROPE_BLOCK,
    "gptj": _PARALLEL,
    "falcon": _PARALLEL,
    "phi": _PARALLEL,
    "gemma2": "it soft-caps its logits and norms the FFN's output too (sandwich norms), and no stock MoE block does both",
    "gemma3": _SANDWICH,
    "gemma3_text": _SANDWICH,
    "olmo3": "it mixes sliding windows with post-norms, and no stock MoE architecture has both",
    "exaone4": "it norms after each block, and its MoE relative norms before",
    "apertus": "its FFN is not gated and has an activation of its own (xIELU), and no stock MoE architecture has such experts",
    "bitnet": "it norms inside its FFN, and no stock MoE architecture does",
    "glm4": "it norms the outputs of attention and FFN too, and its MoE relative does not",
    "qwen3_5": "it is multimodal; save its text model alone (model_type qwen3_5_text)",
    **dict.fromkeys(_ENCODERS, "it is an encoder, not a causal language model"),
    **dict.fromkeys(_ENCODER_DECODERS, "it is an encoder-decoder, not a causal language model"),
    **dict.fromkeys(_MOES, "it is a Mixture-of-Experts already"),
}


_TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config", "decoder_config")


def text_model(raw: Mapping[str, Any]) -> str | None:
    """Return the name of a multimodal configuration's text model, quoted for messages; None if it is not multimodal."""
    for key in _TEXT_CONFIGS:
        if isinstance(raw.get(key), Mapping):
            return f"'{shortened(raw[key].get('model_type') or key)}'"
    return "'text_config'" if isinstance(raw.get("vision_config"), Mapping) else None


def reason(model_type: str, inner: str | None = None) -> str:
    """Return why a family that is not registered is refused; ``inner`` is the text model of a multimodal one."""
    if inner:
        return f"it is multimodal (vision or audio beside a text model, {inner})"
    return REASONS.get(model_type, "this version has no family for it")
