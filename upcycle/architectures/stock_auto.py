"""Chooses the Auto class of transformers by which a configuration's model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

from upcycle.files.formats.settings import base_type
from upcycle.registry import FAMILIES, WRAPPERS, find

SEEDED = ("images", "sounds")  # what is made of a seed alone: a model that reads one of them reads no text
# Auto classes of a model and its head, where neither its configuration nor what it reads is a causal language model's.
_READ = {"input_ids": "text", "pixel_values": "images", "input_values": "sounds"}  # by a class's main input
_READ_BY_TWO = {"input_ids": "pairs", "input_features": "speech"}  # of an encoder and a decoder
_WITH_HEAD = {"pairs": "AutoModelForSeq2SeqLM", "speech": "AutoModelForSpeechSeq2Seq"}


class ClassFacts(NamedTuple):
    """What a class of transformers says of itself: see :class:`~upcycle.architectures.described.ffn_place.DescribedModel`."""

    encoder: bool
    reads: str
    both_ways: str | None = None


def is_encoder(config: Any) -> bool:
    """Return whether a configuration, or the content of its file, is that of an encoder, which has no logits of a next token."""
    described = _described(config)
    if described is None:
        return False
    if described.both_ways is not None:
        key: str = described.both_ways
        return bool(config.get(key) if isinstance(config, Mapping) else getattr(config, key, False))
    return described.encoder or (described.reads in _WITH_HEAD and not _generates(config))


def is_encoder_decoder(config: Any) -> bool:
    """Return whether a configuration, or the content of its file, has an encoder, and a decoder with logits of what follows."""
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
    return not names or any(
        str(name).endswith("ForConditionalGeneration") or str(name).endswith("MTModel") for name in names
    )


def auto_class(config: Any) -> Any:
    """Return the Auto class that builds a model with its head, and with all parts if it has several.

    For an encoder, it is the Auto class of the class that ``architectures`` names; one whose configuration names no class of
    transformers is loaded without a head. A model of an encoder and a decoder is loaded with its head, unless it names a class
    without one.
    """
    import transformers
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM

    if find("wrapper", base_type(config)) is not None:
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

    base = value("base_model_type")
    found = find("described", str(base or value("model_type")))
    if found is not None or base is None or base in (*FAMILIES, *WRAPPERS):
        return found
    return class_facts(config, str(base))  # of a model whose FFNs were found, not described


def class_facts(config: Any, model_type: str) -> ClassFacts | None:
    """Return what the class that a configuration's (or its file's) ``architectures`` names says of itself.

    None where it names none of this ``model_type``, or one that reads what no input is made of here.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    raw: Mapping[str, Any] = config if isinstance(config, Mapping) else vars(config)
    name = str((raw.get("architectures") or [""])[0]).removeprefix("UpcycleMoe")
    stock = getattr(transformers, name, None)
    settings = getattr(stock, "config_class", None)
    if stock is None or getattr(settings, "model_type", None) != model_type:
        return None
    both = bool(raw.get("is_encoder_decoder", getattr(settings, "is_encoder_decoder", False)))
    reads = (_READ_BY_TWO if both else _READ).get(str(stock.main_input_name))
    causal = name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return None if reads is None else ClassFacts(encoder=not (causal or both), reads=reads)


def _names(auto: Any, config_class: Any) -> list[str]:
    found = auto._model_mapping.get(config_class, None)
    several = found if isinstance(found, tuple) else (found,)
    return [one.__name__ for one in several if one is not None]


@cache
def _auto_classes() -> list[Any]:
    from transformers.models.auto import modeling_auto

    found = [getattr(modeling_auto, name) for name in dir(modeling_auto) if name.startswith("AutoModel")]
    return [auto for auto in found if getattr(auto, "_model_mapping", None) is not None]
