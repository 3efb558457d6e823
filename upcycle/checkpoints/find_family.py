"""Finds the family that a configuration belongs to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from upcycle.architectures.dense.base import Family
from upcycle.architectures.described.family import DescribedFamily
from upcycle.architectures.moe_families import MOES
from upcycle.architectures.refused import REASONS, reason, text_model
from upcycle.architectures.towers.composite import composite_family
from upcycle.architectures.towers.parts import LANGUAGE, PartsFamily
from upcycle.errors import RefusalError
from upcycle.files.formats.folder_contents import shortened
from upcycle.files.formats.settings import model_type
from upcycle.registry import DESCRIBED, FAMILIES, TARGETS, WRAPPERS, find, load

Tried = Callable[[Mapping[str, Any], str], Family]  # makes a family of a configuration that no family reads


def family_of(
    raw_config: Mapping[str, Any], where: str, tried: Tried | None = None, parts: tuple[str, ...] = ()
) -> Family:
    """Return the registered family of a configuration; of one that nobody described, what ``tried`` makes of it.

    Args:
        raw_config: the content of ``config.json``.
        where: its name in messages.
        tried: see above.
        parts: of a model of parts, those that are converted; its text model alone is one of a family with targets.

    Raises:
        RefusalError: there is none; the message says why.
    """
    name = model_type(raw_config, where)
    if name in WRAPPERS:
        composite = composite_family(raw_config, where)
        return PartsFamily(composite) if set(parts) - {"auto", LANGUAGE} else composite
    described = find("described", name) if name in DESCRIBED else None
    if described is not None and not _held(name, raw_config, where):
        return DescribedFamily(described)
    if name not in FAMILIES and tried is not None and name not in (*MOES, *TARGETS):
        return tried(raw_config, where)
    if name not in FAMILIES:
        hint = f"dense families: {', '.join(FAMILIES)}"
        if inner := text_model(raw_config):
            hint = f"save only its text model ({inner}), with that model's config.json and tensor names that begin with model."
        elif name in MOES:
            hint = (
                "--method expert_upcycling gives it more experts; upcycle compress, with naee or slim, makes it smaller"
            )
        elif name not in REASONS:
            hint = f"--family auto-wrap tries to find its FFNs, and wraps it where it does; {hint}"
        raise RefusalError(f"cannot convert a '{shortened(name)}' model: {reason(name, inner)}", hint=hint)
    family: Family = load("family", name)()
    return family


def _held(name: str, raw_config: Mapping[str, Any], where: str) -> bool:
    """Return whether a family with stock targets reads the configuration, and not only the description of its FFNs."""
    if name not in FAMILIES:
        return False
    try:
        load("family", name)().config(raw_config, where)
    except RefusalError:
        return False
    return True
