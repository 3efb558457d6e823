"""Chooses the Auto class of transformers by which a configuration's model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from upcycle.files.formats.settings import base_type
from upcycle.registry import find


def is_encoder(config: Any) -> bool:
    """Return whether a configuration, or the content of its file, is that of an encoder, which has no logits of a next token."""
    described = _described(config)
    if described is None or described.both_ways is None:
        return described is not None and described.encoder
    key: str = described.both_ways
    return bool(config.get(key) if isinstance(config, Mapping) else getattr(config, key, False))


def reads_images(config: Any) -> bool:
    """Return whether a configuration, or the content of its file, is that of an encoder of images."""
    described = _described(config)
    return described is not None and described.images


def auto_class(config: Any) -> Any:
    """Return the Auto class that builds a model with its head, and with all parts if it has several.

    For an encoder, it is the Auto class of the class that ``architectures`` names; one whose configuration names no class of
    transformers is loaded without a head.
    """
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM

    if find("wrapper", base_type(config)) is not None:
        return AutoModelForMultimodalLM
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
    return find("described", base_type(config))


def _names(auto: Any, config_class: Any) -> list[str]:
    found = auto._model_mapping.get(config_class, None)
    several = found if isinstance(found, tuple) else (found,)
    return [one.__name__ for one in several if one is not None]


@cache
def _auto_classes() -> list[Any]:
    from transformers.models.auto import modeling_auto

    found = [getattr(modeling_auto, name) for name in dir(modeling_auto) if name.startswith("AutoModel")]
    return [auto for auto in found if getattr(auto, "_model_mapping", None) is not None]
