"""The description of a stock model of parts: a text model that is converted, beside encoders that stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from upcycle.architectures.dense.base import Family
from upcycle.architectures.described.family import DescribedFamily
from upcycle.architectures.described.ffn_place import DescribedModel
from upcycle.architectures.moe.base import Target
from upcycle.architectures.towers.samples import SampleInputs
from upcycle.registry import find, load

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Wrapper:
    """Describes a class of transformers that builds its text model from ``text_config``, and has the head itself.

    Any dense family that is known can be that text model, and any target its MoE: what is said of them elsewhere holds here.

    Attributes:
        name: its ``model_type``.
        title: its name in prose.
        sample: makes a random image or sound for a stock configuration, as the stock class takes it, by the names of its arguments.
        kind: what that is.
        body: the path of the text model.
        moe: the ``model_type`` of the result; None: the same class holds the MoE.
        families: dense text models that are met in this class only, by ``model_type``.
        targets: their MoEs, by name.
        typed: the argument by which the stock class must be told which tokens are images.
        rewrite: turns the keys of ``config.json`` outside the text model into those of the result's class.
        remark: what the user should know about the result, or empty.
    """

    name: str
    title: str
    sample: Callable[[Any, torch.Generator], SampleInputs]
    kind: Literal["image", "sound"] = "image"
    body: str = "model.language_model"
    moe: str | None = None
    families: Mapping[str, type[Family]] = field(default_factory=dict)
    targets: Mapping[str, type[Target]] = field(default_factory=dict)
    typed: str | None = None
    rewrite: Callable[[Mapping[str, Any]], dict[str, Any]] = dict
    remark: str = ""

    @property
    def text_models(self) -> tuple[str, ...]:
        """Which text models it can have, in words: of any family, unless its MoE's class builds a text model of its own."""
        return ("of any family",) if self.moe is None else tuple(self.families) or (f"{self.name}_text",)

    @property
    def result(self) -> str:
        """The ``model_type`` of the result."""
        return self.moe or self.name

    def family(self, model_type: str) -> Family | None:
        """Return the family of a text model of this type; None: it is not known."""
        kind: Any = self.families.get(model_type) or find("family", model_type)
        if kind:
            family: Family = kind()
            return family
        described: DescribedModel | None = find("described", model_type)
        if described is None or described.paths is None or described.encoder:
            return None
        return DescribedFamily(described)

    def target(self, name: str) -> Target:
        """Return the target of this name, for the text model.

        Raises:
            UsageError: there is none.
        """
        target: Target = (self.targets.get(name) or load("target", name))()
        return target


def renamed_parts(old: str, new: str, parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configurations of parts with ``new`` in place of ``old`` where their ``model_type`` begins with it."""

    def renamed(part: Any) -> Any:
        kind = part.get("model_type") if isinstance(part, Mapping) else None
        if not isinstance(kind, str) or not kind.startswith(old):
            return part
        return {**part, "model_type": new + kind.removeprefix(old)}

    return {key: renamed(value) for key, value in parts.items()}
