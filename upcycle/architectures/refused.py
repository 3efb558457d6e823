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
_LINEAR = "can only be undone by weights so small that they train at learning rates of their own, if at all"
_GEMMA3 = f"it norms the FFN's output too, as Gemma 4's MoE does, but that also norms values, which {_LINEAR}"
_MOES = (
    *(
        "deepseek_v2",
        "exaone_moe",
        "glm4_moe_lite",
        "jamba",
        "jetmoe",
        "llama4",
        "llama4_text",
    ),
    *("minimax", "minimax_m2", "olmoe", "qwen3_5_moe", "qwen3_next", "qwen3_vl_moe"),
    *TARGETS,
)

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
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
    "olmo3": "it mixes sliding windows with post-norms, and no stock MoE architecture has both",
    "exaone4": f"it norms behind each block and not before it, and the norms before each block of MoEs that do both {_LINEAR}",
    "apertus": "its FFN is not gated and has an activation of its own (xIELU), and no stock MoE architecture has such experts",
    "bitnet": "it norms inside its FFN, and no stock MoE architecture does",
    "convnextv2": "it norms inside its FFN (over the whole image), and no expert that reads a part of the tokens can",
    "glm4": f"it norms the outputs of attention and FFN too, and MoEs that do norm queries and keys, which {_LINEAR}",
    "hyperclovax": f"it norms the outputs of attention and FFN too, and MoEs that do norm queries and keys, which {_LINEAR}",
    "gemma4_text": "the MoE that holds it has the same model_type, by which this version tells MoEs from dense models",
    **dict.fromkeys(_MOES, "it is a Mixture-of-Experts already"),
}


_OF_PARTS = {  # models of parts that do not load as those of upcycle/architectures/towers do
    "paligemma": "its text model reads image and prompt in both directions, and no MoE text model of transformers does",
    "mllama": "layers of its text model attend to images, and no MoE text model of transformers has such layers",
    "qwen2_vl": "its class has no MoE text model, and no class that has one builds its encoder of images",
    "qwen2_audio": "its class does not give the features of a sound by themselves, so that no conversion can be verified on one",
    "granite_speech": "an adapter changes its text model where there is sound, and it would not fit the converted one",
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
        return _OF_PARTS.get(model_type) or f"it is multimodal (vision or audio beside a text model, {inner})"
    return REASONS.get(model_type, "this version has no family for it")
