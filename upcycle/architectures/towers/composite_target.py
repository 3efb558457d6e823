"""A model of parts as a target: the text model's MoE, whose names get the wrapper's prefix, and the other parts as they are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from upcycle.architectures.dense.base import Family
from upcycle.architectures.dense_config import DenseConfig, Feature
from upcycle.architectures.moe.base import ExpertLayout, OutputTensor, Target
from upcycle.architectures.tensor_origin import Origin
from upcycle.architectures.towers.composite import TEXT, CompositeConfig, CompositeFamily, written_name
from upcycle.architectures.towers.part_places import refuse_part
from upcycle.architectures.towers.parts import PartsFamily
from upcycle.architectures.towers.wrapper import Wrapper
from upcycle.errors import UsageError
from upcycle.ffn.moe_shape import MoeShape
from upcycle.registry import OWN_TARGETS, load

if TYPE_CHECKING:
    from upcycle.ffn.expert_tensors import ExpertTensors
    from upcycle.ffn.gated_experts import BuildsParts


class CompositeTarget(Target):
    """Stores a model of parts whose text model is a MoE of ``inner``'s architecture.

    Tensors are written under the names that the source's files have: other parts' as they are, the text model's with the same
    prefix.

    Args:
        wrapper: the model of parts.
        inner: the architecture of the text model's MoE.
    """

    def __init__(self, wrapper: Wrapper, inner: Target) -> None:
        self.wrapper, self.inner = wrapper, inner
        self.name, self.title = inner.name, f"{wrapper.title} ({inner.title})"
        self.holds, self.holds_unnormalized = inner.holds, inner.holds_unnormalized
        self.router_semantics, self.rotates_pairs = inner.router_semantics, inner.rotates_pairs
        self.router, self.score = inner.router, inner.score
        self.shared, self.shared_switch = inner.shared, inner.shared_switch
        self.top_k, self.weight_of_chosen = inner.top_k, inner.weight_of_chosen
        self.module_paths = inner.module_paths.inside(wrapper.body)

    def config(self, dense: DenseConfig, shape: MoeShape) -> dict[str, Any]:
        """Return the keys of the text model's configuration that only its architecture has."""
        return self.inner.config(dense, shape)

    def moe_tensors(self, dense: DenseConfig, shape: MoeShape, layer: int, layout: ExpertLayout) -> list[OutputTensor]:
        """Return every tensor of one MoE block of the text model."""
        tensors = self.inner.moe_tensors(dense, shape, layer, layout)
        return [replace(t, name=self.inner.module_paths.renamed(t.name, self.module_paths)) for t in tensors]

    def layer_specs(self, family: Family, dense: DenseConfig, layer: int) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of one layer's tensors outside the FFN."""
        assert isinstance(family, CompositeFamily)
        return family.outer(self.inner.layer_specs(family.inner, dense, layer))

    def last_specs(self, family: Family, dense: DenseConfig) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of the text model's tensors after the layers; the head is the wrapper's own, without a bias."""
        assert isinstance(family, CompositeFamily)
        specs = self.inner.last_specs(family.inner, dense)
        return family.outer({k: v for k, v in specs.items() if k != f"{family.inner.module_paths.head}.bias"})

    def stored_width(self, shape: MoeShape) -> int:
        """Return how many neurons an expert of the text model has on disk."""
        return self.inner.stored_width(shape)

    def built(self, tensors: ExpertTensors, dense: DenseConfig) -> BuildsParts:
        """Return what makes the parts of the text model's tensors."""
        return self.inner.built(tensors, dense)

    def folded(self, dense: DenseConfig) -> str | None:
        """Return what is folded into the text model's experts."""
        return self.inner.folded(dense)

    def masks(self, dense: DenseConfig) -> bool:
        """Return whether the text model's rotary embedding is written as one of whole heads."""
        return self.inner.masks(dense)

    def remarks(self, dense: DenseConfig) -> list[str]:
        """Return what every user of a converted model should know."""
        return self.inner.remarks(dense)

    def origin(self, family: Family, dense: DenseConfig, name: str) -> Origin:
        """Return where a tensor outside the experts comes from."""
        assert isinstance(family, CompositeFamily)
        assert isinstance(dense, CompositeConfig)
        if name in dense.towers:
            return Origin(name)
        plain = family.module_paths.renamed(name, family.inner.module_paths)
        origin = self.inner.origin(family.inner, dense, plain)
        return replace(origin, name=family.inner.module_paths.renamed(origin.name, family.module_paths))

    def stored(self, dense: DenseConfig) -> DenseConfig:
        """Return the dense configuration in terms that the text model's architecture can express."""
        return self.inner.stored(dense)

    def lacks(self, dense: DenseConfig, more: Iterable[Feature] = ()) -> list[Feature]:
        """Return the features that the text model's architecture cannot hold.

        Where embeddings are multiplied, images go into the text model beside them. A table that multiplies, as Gemma's, leaves
        images as they are; a text model that multiplies all that it reads, as Granite's, does not. Only a target that does the
        same keeps both. Nor can images be divided, or lose their means, as a text model's stream is and does for some targets.
        """
        found = self.inner.lacks(dense, more)
        assert isinstance(dense, CompositeConfig)
        divided = self.inner.stored(dense).residual_multiplier != dense.residual_multiplier
        if divided or self.inner.centred(dense):
            return [*found, Feature.IMAGE_SCALE]
        if dense.embedding_multiplier == 1 or Feature.MULTIPLIERS in found:
            return found
        return found if dense.scaled_table != (Feature.MULTIPLIERS in self.holds) else [*found, Feature.IMAGE_SCALE]

    def written(self, dense: DenseConfig, name: str) -> str:
        """Return the name under which a tensor is written: that of the source's files, or one with the prefix that they have.

        A class of its own reads the names of its modules, and not the older ones that the source's class may have.
        """
        return name if self.wrapper.moe else written_name(self.module_paths, dense, name)

    def full_config(self, dense: DenseConfig, shape: MoeShape, dtype: str) -> dict[str, Any]:
        """Return the source's ``config.json`` with the MoE's configuration as that of the text model."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

        assert isinstance(dense, CompositeConfig)
        text = self.inner.full_config(dense, shape, dtype)
        kind = self.wrapper.result
        return {
            "architectures": [MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[kind]],
            "model_type": kind,
            "dtype": dtype,
            **self.wrapper.rewrite(dense.parts),
            "tie_word_embeddings": text["tie_word_embeddings"],
            TEXT: text,
        }


def target_of(family: Family, name: str) -> Target:
    """Return the target of this name as it holds a model of ``family``: of a model of parts, inside its wrapper.

    Raises:
        UsageError: there is no such target.
        RefusalError: it does not hold models of parts.
    """
    if isinstance(family, CompositeFamily):
        if name in OWN_TARGETS:
            own: Target = load("own_target", name)()
            return own.of(family)
        return CompositeTarget(family.wrapper, family.wrapper.target(name))
    target: Target = load("own_target" if name in OWN_TARGETS else "target", name)()
    return target.of(family)


def check_part(family: Family, parts: tuple[str, ...]) -> None:
    """Refuse to convert a part that a model does not have, or one without FFNs that experts can stand for.

    Raises:
        UsageError: the model has no such part.
        RefusalError: the part cannot be converted; the message says why.
    """
    known = ("language",) if isinstance(family, CompositeFamily) else family.parts
    whole = ("auto", "all") if isinstance(family, PartsFamily) else ("auto", "all", "both")
    for part in parts:
        if isinstance(family, PartsFamily) and part in family.missing:
            raise refuse_part(family.name, part, family.missing[part], family.parts)
        if part in known or part in (whole if known else ("auto", "all", "language")):
            continue
        if not known:
            raise UsageError(
                f"part: a {family.name} model is a text model, and has no part '{part}'",
                hint="leave the key 'part' out",
            )
        raise UsageError(
            f"part: a {family.name} model has no part '{part}'",
            hint=f"part: {', '.join(known)}, or {whole[-1]}"
            + (" (the default)" if not isinstance(family, PartsFamily) else ""),
        )
    if len(parts) > 1 and {"auto", "all", "both"} & set(parts):
        raise UsageError(f"part: {', '.join(parts)}: a list names single parts", hint="part: all, without a list")
