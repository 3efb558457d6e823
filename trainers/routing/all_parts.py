"""Which parts of a model of parts are read by the data, and so train: its text model alone, or all, where there are images."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from upcycle.architectures.module_paths import module_paths_of
from upcycle.architectures.towers.part_places import is_connector
from upcycle.files.formats.settings import base_type
from upcycle.registry import find

ModelPart: TypeAlias = Literal["language", "vision", "connector"]
PART_NAMES: tuple[ModelPart, ...] = ("language", "vision", "connector")
_MARK = "_upcycle_reads_images"


def train_all_parts(model: Any) -> None:
    """From now on, every part of a model trains, and its routers are read: the data have images."""
    setattr(model, _MARK, True)


def reads_images(model: Any) -> bool:
    """Whether :func:`train_all_parts` was called."""
    return bool(getattr(model, _MARK, False))


def part_name(model: Any, name: str) -> ModelPart:
    """Return the part that a module or parameter of a model is in, by its name; of a model without parts ``language``."""
    if find("wrapper", base_type(model.config)) is None or module_paths_of(model.config).has(name):
        return "language"
    return "connector" if is_connector(name.removeprefix(f"{model.base_model_prefix}.")) else "vision"
