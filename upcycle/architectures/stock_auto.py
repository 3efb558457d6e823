"""Chooses the Auto class of transformers by which a configuration's model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from upcycle.registry import find


SEEDED = ("images", "sounds")  # what is made of a seed alone: a model that reads one of them reads no text
# Auto classes of a model and its head, where neither its configuration nor what it reads is a causal language model's.
_WITH_HEAD = {"pairs": "AutoModelForSeq2SeqLM", "speech": "AutoModelForSpeechSeq2Seq"}


def is_encoder(config: Any) -> bool:
    """Return whether a configuration, or the content of its file, is that of an encoder, which has no logits of a next token."""
    described = _described(config)
    if described is None or described.encoder:
        return described is not None
    return described.reads in _WITH_HEAD and not _generates(config)


def is_encoder_decoder(config: Any) -> bool:
    """Return whether a configuration, or the content of its file, is that of an encoder and a decoder, whose logits say what follows."""
    return reads_of(config) in _WITH_HEAD and not is_encoder(config)


def reads_of(config: Any) -> str:
    """Return what the model of a configuration, or of the content of its file, reads.

    See :data:`~upcycle.architectures.described.ffn_place.Reads`; a model that nobody described reads text.
    """
    described = _described(config)
    return "text" if described is None else str(described.reads)


def _generates(config: Any) -> bool:
    """Return whether the class that a configuration of an encoder and a decoder names has a head; one that names none has."""
    names = config.get("architectures") if isinstance(config, Mapping) else getattr(config, "architectures", None)
    return not names or any(str(name).endswith("ForConditionalGeneration") or str(name).endswith("MTModel") for name in names)


def auto_class(config: Any) -> Any:
    """Return the Auto class that builds a model with its head, and with all parts if it has several.

    For an encoder, it is the Auto class of the class that ``architectures`` names; one whose configuration names no class of
    transformers is loaded without a head. A model of an encoder and a decoder is loaded with its head, unless it names a class
    without one.
    """
    import transformers
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM

    if find("wrapper", str(config.model_type)) is not None:
        return AutoModelForMultimodalLM
    if is_encoder_decoder(config):
        return getattr(transformers, _WITH_HEAD[reads_of(config)])
    if not is_encoder(config):
        return AutoModelForCausalLM
    named = set(getattr(config, "architectures", None) or ())
    return next((auto for auto in _auto_classes() if named & set(_names(auto, type(config)))), AutoModel)


def class_name(config: Any) -> str:
    """Return the name of the stock class by which a configuration's model is loaded."""
    auto = auto_class(config)
    names = _names(auto, type(config))
    named = [name for name in getattr(config, "architectures", None) or () if name in names]
    return (named or names)[0]


def _described(config: Any) -> Any:
    def value(key: str) -> Any:
        return config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)

    return find("described", str(value("base_model_type") or value("model_type")))


def _names(auto: Any, config_class: Any) -> list[str]:
    found = auto._model_mapping.get(config_class, None)
    several = found if isinstance(found, tuple) else (found,)
    return [one.__name__ for one in several if one is not None]


@cache
def _auto_classes() -> list[Any]:
    from transformers.models.auto import modeling_auto

    found = [getattr(modeling_auto, name) for name in dir(modeling_auto) if name.startswith("AutoModel")]
    return [auto for auto in found if getattr(auto, "_model_mapping", None) is not None]
