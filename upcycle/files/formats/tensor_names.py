"""Recognises by the names of a checkpoint's tensors what it is, where these are not the names that its family has."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from upcycle.errors import CheckpointError, RefusalError
from upcycle.files.formats.folder_contents import shortened

if TYPE_CHECKING:
    from upcycle.files.formats.tensor_spec import TensorSpec

_QUANTIZED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|weight_packed|weight_scale(_inv)?|weight_zero_point|SCB|absmax|quant_map|q_weight|"
    r"q_scale|codebooks|codes|weight\.(absmax|quant_map|nested_absmax|quant_state\S*))$"
)
FLOATS = ("float64", "float32", "float16", "bfloat16")  # what weights can be: anything else stands for other numbers
_MERGED = "merge it first: model.merge_and_unload().save_pretrained(FOLDER)"
_TEXT_ONLY = "save its text model alone, with a config.json of that (text_config) and names that begin with model."
_TYPE = "correct config.json's 'model_type'"
# (beginning of a name, whose names begin with it, hint)
_PREFIXES = (
    ("base_model.model.", "a PEFT wrapper's", _MERGED),
    ("model.language_model.", "a vision-language model's", _TEXT_ONLY),
    ("language_model.", "a vision-language model's", _TEXT_ONLY),
    ("model.text_model.", "a multimodal model's", _TEXT_ONLY),
    ("text_model.", "a multimodal model's", _TEXT_ONLY),
    ("thinker.", "a multimodal model's", _TEXT_ONLY),
    ("llm.", "a multimodal model's", _TEXT_ONLY),
    ("_orig_mod.", "torch.compile's", "save the model that was compiled: model._orig_mod.save_pretrained(FOLDER)"),
    ("module.", "a data-parallel wrapper's", "save the model that was wrapped: model.module.save_pretrained(FOLDER)"),
    ("_forward_module.", "a trainer's", "save the model itself: model.save_pretrained(FOLDER)"),
    ("transformer.", "another architecture's", _TYPE),
)
_PARTS = (
    (r"\.lora_[AB]\.|\.lora_embedding_|\.lora_magnitude", "a LoRA adapter that is not merged", _MERGED),
    (
        r"(^|\.)(vision_tower|vision_model|visual|multi_modal_projector|mm_projector|audio_tower|image_newline)\b",
        "parts of a vision-language or audio model",
        _TEXT_ONLY,
    ),
    (
        r"^(score|classifier|v_head|value_head|regression_head|qa_outputs)\b",
        "a head for classes or rewards",
        "convert the causal language model that it was made from",
    ),
    (
        r"\.experts\.|\.block_sparse_moe\.",
        "experts: it is a Mixture-of-Experts already",
        f"{_TYPE}; --method expert_upcycling gives a MoE more experts",
    ),
)


def unlike_family(names: Iterable[str], expected: Iterable[str], where: str) -> CheckpointError | None:
    """Return an error that says what a checkpoint is, judged by its tensors' names; None where they tell nothing special.

    Args:
        names: the names of the checkpoint's tensors.
        expected: the names that its family has.
        where: the checkpoint, for the message.
    """
    held, wanted = set(names), set(expected)
    odd = sorted(held - wanted)
    if not held:
        return CheckpointError(f"{where}: its weight files hold no tensor", hint="download or copy the weights again")
    found = _wrapped(odd, wanted, where) or _of_another_kind(odd, where)
    return found or _headless(odd, wanted - held, wanted, where)


def _wrapped(odd: list[str], wanted: set[str], where: str) -> CheckpointError | None:
    for prefix, whose, hint in _PREFIXES:
        for name in odd:
            rest = name.removeprefix(prefix)
            if rest != name and (rest in wanted or f"model.{rest}" in wanted):
                return CheckpointError(
                    f"{where}: tensors have {whose} names: '{prefix}...' ('{shortened(name)}')", hint=hint
                )
    return None


def _of_another_kind(odd: list[str], where: str) -> CheckpointError | None:
    for pattern, what, hint in _PARTS:
        for name in odd:
            if re.search(pattern, name):
                return CheckpointError(f"{where} holds {what}: '{shortened(name)}'", hint=hint)
    return None


def _headless(odd: list[str], missing: set[str], wanted: set[str], where: str) -> CheckpointError | None:
    bare = [name for name in odd if f"model.{name}" in wanted]
    if bare:
        return CheckpointError(
            f"{where} is a model without a head, as embedding models are: its tensors are '{shortened(bare[0])}' and so on, "
            "without 'model.' before them",
            hint="convert the causal language model that it was made from, or save this one with a head: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(OTHER)",
        )
    if missing == {"lm_head.weight"} and not odd:
        return CheckpointError(
            f"{where} is a model without a head: 'lm_head.weight' is missing, and config.json does not tie it",
            hint="convert the whole causal language model; if its head is the embedding, set config.json's "
            "'tie_word_embeddings' to true",
        )
    return None


def is_block_fp8(raw: Mapping[str, Any]) -> bool:
    """Return whether ``config.json`` says that matrices are stored in FP8 with scales."""
    settings = raw.get("quantization_config")
    return isinstance(settings, Mapping) and settings.get("quant_method") == "fp8"


def refuse_quantized(specs: Mapping[str, TensorSpec], raw: Mapping[str, Any], where: str) -> None:
    """Refuse quantized weights, judged by the tensors' names and dtypes; a leftover ``quantization_config`` does not matter.

    Raises:
        RefusalError: a tensor's name or dtype is that of quantized weights.
    """
    for name, spec in specs.items():
        if _QUANTIZED.search(name):
            raise quantized_weights(raw, where, f"tensor '{shortened(name)}'")
        if spec.dtype not in FLOATS:
            raise quantized_weights(raw, where, f"tensor '{shortened(name)}' is {spec.dtype}")


def refuse_said_quantized(raw: Mapping[str, Any], where: str) -> None:
    """Refuse quantized weights where only ``config.json`` is at hand.

    Raises:
        RefusalError: it has a ``quantization_config``.
    """
    if raw.get("quantization_config"):
        found = quantized_weights(raw, where, "config.json has a 'quantization_config'")
        if is_block_fp8(raw):
            found.hint = "FP8 weights are read, but a plan needs their headers: download them, and plan from the folder"
        raise found


def quantized_weights(raw: Mapping[str, Any], where: str, what: str) -> RefusalError:
    """Return the error for quantized weights; ``what`` is the part of the checkpoint that shows it."""
    settings = raw.get("quantization_config") or raw.get("quantization") or raw.get("compression_config")
    settings = settings if isinstance(settings, Mapping) else {}
    method = settings.get("quant_method") or settings.get("quant_algo") or "config.json does not say how"
    return RefusalError(
        f"{where}: the weights are quantized ({shortened(method)}): {what}",
        hint="convert the full-precision checkpoint that they were made from",
    )
