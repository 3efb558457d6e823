"""The protocol of growth steps, which write whole tensors of the source, not experts made of its neurons."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from upcycle.architectures.dense.base import DenseConfig, Family
from upcycle.architectures.tensor_origin import Origin
from upcycle.errors import RefusalError
from upcycle.files.formats.tensor_spec import TensorSpec
from upcycle.methods.base import AnyMethod, MethodKind

if TYPE_CHECKING:
    import torch

    from upcycle.architectures.stored_moe import MoeModel
    from upcycle.checkpoints.moe_checkpoint import MoeCheckpoint
    from upcycle.progress import Progress
    from upcycle.recipe.conversion_recipe import Recipe

CopiedExperts = dict[int, tuple[int, ...]]  # layer -> for each expert of the result, the source's expert that it copies
Promise = tuple[Literal["exact", "approximate"], str]


@dataclass(frozen=True)
class Described:
    """Describes a checkpoint by its ``config.json`` and its tensors' headers.

    ``where`` is its name in messages; ``made_of`` the architecture of the model that upcycle made it of, empty where it did not;
    ``added`` the dense model whose FFNs a MoE gets as experts, None where it gets none.
    """

    raw: Mapping[str, Any]
    specs: Mapping[str, TensorSpec]
    where: str
    made_of: str = ""
    added: Described | None = None


@dataclass(frozen=True)
class Piece:
    """A part of the result that is written in one go: its name, its layer or ``None``, and the origin of each tensor."""

    name: str
    layer: int | None
    tensors: Mapping[str, Origin]


@dataclass(frozen=True)
class Grown:
    """Describes the result of a growth step, before a weight is read.

    Attributes:
        config: its ``config.json``.
        pieces: all its tensors, in the order in which they are written.
        promise: ``exact`` or ``approximate``, and the reason.
        summary: what the step does, in a few words.
        made: what was decided, which is written as ``growth.json``.
        context: the longest input in tokens.
        vocab_size: its vocabulary size.
        hidden_size: its hidden size.
        tied: whether the embedding is the head.
        idle: the parameters in experts that a token does not use.
        source_idle: the same number for the source.
        resolved: recipe keys that the step worked out.
        warnings: remarks for the plan.
    """

    config: dict[str, Any]
    pieces: tuple[Piece, ...]
    promise: Promise
    summary: str
    made: dict[str, Any]
    context: int
    vocab_size: int
    hidden_size: int
    tied: bool
    idle: int = 0
    source_idle: int = 0
    resolved: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class Growth(AnyMethod):
    """Makes a larger (or averaged) model of the same architecture by copying tensors. It writes no file.

    Attributes:
        keys: the recipe keys that it reads in addition to those that every step reads.
        decides: what it decides of every layer, as the file of decisions calls it.
        next_step: the command to suggest to the user afterwards.
    """

    kind: MethodKind = "growth"
    keys: ClassVar[frozenset[str]] = frozenset()
    decides: ClassVar[str] = "experts"
    next_step: ClassVar[str]

    @abstractmethod
    def grow(self, source: Described, recipe: Recipe, choice: Any = None) -> Grown:
        """Describe the result.

        Args:
            source: the model that grows.
            recipe: the recipe.
            choice: what was decided of every layer (by :meth:`choose`, copied experts); None: nothing is yet, and any choice has
                the same shapes.

        Raises:
            UsageError: the recipe cannot be carried out on this model.
            RefusalError: the step does not take this model.
        """

    @property
    def text_for(self) -> str | None:
        """What calibration text is needed for, in words; ``None``: none is read."""
        return None

    def memory(self, source: Described, recipe: Recipe) -> int:
        """Return the bytes of memory that running the model on text takes; 0 where no text is read."""
        return 0

    def choose(
        self, checkpoint: MoeCheckpoint, recipe: Recipe, windows: torch.Tensor | None, progress: Progress
    ) -> tuple[CopiedExperts, dict[str, Any]] | None:
        """Decide what depends on weights or text.

        Returns:
            The copied experts, and the measurements that decided them, as plain data; ``None``: there is nothing to decide.
        """
        return None


class DenseGrowth(Growth):
    """Makes a dense model of the same family, each of whose layers is one of the source's; all other tensors are copied.

    Tensors keep the form in which the source stores them, and their names but for the layer's number.
    """

    takes = "dense"
    keys = frozenset({"dtype"})
    next_step = "upcycle convert {out} MOE --experts 8 --top-k 2"

    @abstractmethod
    def layers(self, count: int) -> Sequence[int]:
        """Return, for every layer of the result, the layer of the source (of ``count``) that it copies."""

    @abstractmethod
    def promise(self, count: int) -> Promise:
        """Return the promise for a source with ``count`` layers, and the reason for it."""

    def warnings(self, count: int) -> tuple[str, ...]:
        """Return remarks for the plan about a source with ``count`` layers."""
        return ()

    def grow(self, source: Described, recipe: Recipe, choice: CopiedExperts | None = None) -> Grown:
        """Describe the result; see :meth:`Growth.grow`."""
        from upcycle.checkpoints.find_family import family_of

        family = family_of(source.raw, source.where)
        family.check_known_whole(self.name)
        paths = family.module_paths
        dense = family.config(source.raw)
        if family.tower_specs(dense):
            raise RefusalError(
                f"{self.name} does not take a '{family.name}' model: it copies the layers of text models alone, and this has other "
                "parts beside its text model",
                hint="methods that make experts, and static_prune, take it",
            )
        layers = list(self.layers(dense.num_hidden_layers))
        first, outside = family.first_specs(dense), family.stored_specs(dense, None)
        pieces = [Piece("embeddings", None, {name: Origin(name) for name in first})]
        for layer, old in enumerate(layers):
            stored, prefixes = family.stored_specs(dense, old), (f"{paths.layer(old)}.", f"{paths.layer(layer)}.")
            tensors = {prefixes[1] + name.removeprefix(prefixes[0]): Origin(name) for name in stored}
            pieces.append(Piece(f"layer {layer}", layer, tensors))
        pieces.append(Piece("final norm", None, {name: Origin(name) for name in outside if name not in first}))
        return Grown(
            config=stacked_config(source.raw, family, dense, layers),
            pieces=tuple(pieces),
            promise=self.promise(dense.num_hidden_layers),
            summary=f"{len(layers)} layers from {dense.num_hidden_layers}",
            made={"layers": layers},
            context=dense.max_position_embeddings,
            vocab_size=dense.vocab_size,
            hidden_size=dense.hidden_size,
            tied=dense.tie_word_embeddings,
            warnings=self.warnings(dense.num_hidden_layers),
        )


def refuse_groups(model: MoeModel, method: str) -> None:
    """Refuse groups of experts for a method that changes how many experts there are, or which lie side by side.

    Raises:
        RefusalError: routers choose groups first.
    """
    if model.groups > 1:
        raise RefusalError(
            f"{method} does not take this '{model.family.name}' model: its routers choose among {model.groups} groups of experts "
            "first ('n_group'), and which group an expert is in would change",
            hint="compressions that keep groups: frequency, reap, hc_smoe, m_smoe, ream; lower_top_k and block_drop leave all experts",
        )


def moe_pieces(model: MoeModel, made: Mapping[int, Mapping[str, Origin]]) -> list[Piece]:
    """Return every tensor of a MoE of as many layers, in the order in which they are written.

    Args:
        model: the source.
        made: the tensors of layers that differ from the source's; all else is copied.
    """
    outside = {name: Origin(name) for name in model.names[None]}
    first = {name: origin for name, origin in outside.items() if "embed" in name}
    pieces = [Piece("embeddings", None, first)]
    for layer in sorted(layer for layer in model.names if layer is not None):
        copied = {name: Origin(name) for name in model.names[layer]}
        pieces.append(Piece(f"layer {layer}", layer, made.get(layer, copied)))
    rest = {name: origin for name, origin in outside.items() if name not in first}
    return [*pieces, Piece("final norm", None, rest)]


def stacked_config(raw: Mapping[str, Any], family: Family, dense: DenseConfig, layers: Sequence[int]) -> dict[str, Any]:
    """Return the ``config.json`` of a model whose layers are the ``layers`` of the source, with per-layer settings reordered.

    Which layers have a window, attend, convolve or are rotated may be a rule over layer numbers (``max_window_layers``,
    ``sliding_window_pattern``, ``full_attention_interval``, ``full_attn_idxs``, ``no_rope_layer_interval``). Where a repeated
    stack breaks the rule, the layers are listed.
    """
    config = {k: v for k, v in family.rewritten(raw).items() if k not in ("full_attn_idxs", "layer_types")}
    config["num_hidden_layers"] = len(layers)
    for key in ("no_rope_layers", "layer_rope_theta"):
        if raw.get(key):
            config[key] = [raw[key][layer] for layer in layers]
    windows = tuple(dense.windows[layer] for layer in layers)
    if "max_window_layers" in raw:  # the only key that loaders before transformers 5 read
        config["max_window_layers"] = next((i for i, window in enumerate(windows) if window), len(layers))
    kinds = dense.extra.get("layer_types") or dense.layer_types
    if "layer_types" in raw or "layer_types" in dense.extra or family.config(config).windows != windows:
        config["layer_types"] = [kinds[layer] for layer in layers]
    thetas = tuple(dense.thetas[layer] for layer in layers) if dense.thetas else ()
    if family.config(config).thetas != thetas:  # a rule over layer numbers, no_rope_layer_interval
        config["no_rope_layers"] = [int(theta != 0) for theta in thetas]
    if (depth := raw.get("scale_depth", 1.4)) and family.config(
        config
    ).residual_multiplier != dense.residual_multiplier:
        config["scale_depth"] = depth * math.sqrt(
            len(layers) / dense.num_hidden_layers
        )  # it is divided by sqrt(layers)
    grown = family.config(config)
    assert math.isclose(grown.residual_multiplier, dense.residual_multiplier)
    assert (grown.windows, grown.thetas) == (windows, thetas), "windows or rotary embeddings moved to other layers"
    return config
