"""Describes where a stock causal language model keeps its parts: one description per architecture, used wherever one is needed."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING, Any

from upcycle.errors import CheckpointError, UsageError
from upcycle.files.formats.folder_contents import shortened
from upcycle.files.formats.settings import base_type
from upcycle.registry import FAMILIES, find

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import nn

    from upcycle.files.formats.tensor_spec import TensorSpec

BELONG_TOGETHER = "compare config.json with the weights: do they belong together?"  # a hint


@dataclass(frozen=True)
class ModulePaths:
    """Holds the dotted paths of a model's parts in its stock class; the defaults are Llama's, which most architectures share.

    With ``.weight`` appended, they are the names of stored tensors, too.

    Args:
        body: everything but the head; it takes token ids or embeddings and returns hidden states.
        layers: the list of decoder layers.
        embedding: the table of token embeddings.
        final_norm: the norm behind the last layer; empty for encoders, whose every class has another one or none.
        head: the projection from normed hidden states to logits.
        stored_head: the head's name in files, where transformers renames it on loading; None: as in memory.
        blocks: the modules of a layer whose outputs add up to its FFN: the dense FFN, or the routed experts and then, in some
            architectures, the shared ones.
        ends: the module of a layer whose output is the FFN's, where ``blocks`` names only its first projection: the layer calls
            the parts of its FFN itself. Experts take the place of that projection.
        output_norm: the norm of a layer that the FFN's output goes through before it is added to the stream; None: it has none.
        closing: the norm of a layer behind the sum of the stream and the FFN's output; None: that sum is the layer's output.
    """

    body: str = "model"
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    stored_head: str | None = None
    blocks: tuple[str, ...] = ("mlp",)
    ends: str | None = None
    output_norm: str | None = None
    closing: str | None = None

    @property
    def embedding_weight(self) -> str:
        """The name of the token embeddings ``[V, d]``."""
        return f"{self.embedding}.weight"

    @property
    def final_norm_weight(self) -> str:
        """The name of the weight ``[d]`` of the norm behind the last layer."""
        return f"{self.final_norm}.weight"

    @property
    def head_weight(self) -> str:
        """The stored name of the head's weight ``[V, d]``, which is not stored where it is tied to the embeddings."""
        return f"{self.stored_head or self.head}.weight"

    @property
    def block(self) -> str:
        """The first of ``blocks``, which is the FFN in a dense model."""
        return self.blocks[0]

    def layer(self, index: int) -> str:
        """Return the path of one decoder layer."""
        return f"{self.layers}.{index}"

    def block_of(self, index: int, which: int = 0) -> str:
        """Return the path of one of a layer's ``blocks``."""
        return f"{self.layers}.{index}.{self.blocks[which]}"

    def layer_of(self, name: str) -> int | None:
        """Return the index of the layer that a tensor or module belongs to; None outside the layers."""
        match = self._in_a_layer.match(name)
        return int(match[1]) if match else None

    @cached_property
    def _in_a_layer(self) -> re.Pattern[str]:
        return re.compile(re.escape(self.layers) + r"\.(\d{1,9})\.")

    def inside(self, body: str) -> ModulePaths:
        """Return the paths of the same architecture where its body is a part, ``body``, of a model that has the head itself."""

        def moved(path: str) -> str:
            return body + path.removeprefix(self.body)

        return replace(
            self,
            body=body,
            layers=moved(self.layers),
            embedding=moved(self.embedding),
            final_norm=moved(self.final_norm),
            stored_head=None,
        )

    def has(self, name: str) -> bool:
        """Return whether a tensor or module is inside the body or the head, and so not in another part of the model."""
        return name.startswith((f"{self.body}.", f"{self.head}."))

    def renamed(self, name: str, other: ModulePaths) -> str:
        """Return the name that a tensor of this architecture has in ``other``; the part inside a layer or the body stays the same."""
        if (layer := self.layer_of(name)) is not None:
            return other.layer(layer) + name.removeprefix(self.layer(layer))
        for mine, its in (
            (self.embedding, other.embedding),
            (self.final_norm, other.final_norm),
            (self.stored_head or self.head, other.stored_head or other.head),
            (self.body, other.body),
        ):
            if name.startswith(f"{mine}."):
                return its + name.removeprefix(mine)
        return name

    def without_prefix(self) -> ModulePaths:
        """Return the same description of the base model alone."""
        body = f"{self.body}."
        return replace(
            self,
            body="",
            layers=self.layers.removeprefix(body),
            embedding=self.embedding.removeprefix(body),
            final_norm=self.final_norm.removeprefix(body),
        )

    def body_in(self, model: Any) -> Any:
        """Return the module that computes hidden states.

        Raises:
            UsageError: the model's architecture is not described here, and keeps that module elsewhere.
        """
        return _submodule(model, self.body)

    def layers_in(self, model: Any) -> Any:
        """Return the list of decoder layers.

        Raises:
            UsageError: see :meth:`body_in`.
        """
        return _submodule(model, self.layers)

    def found_in(self, model: Any) -> ModulePaths:
        """Return these paths with what a model tells of them: for most architectures, its configuration tells all."""
        return self

    def place(self, index: int) -> LayerPlace:
        """Return where one layer is, and which of its modules are the FFN."""
        return LayerPlace(self.layer(index), self.block, self.ends, self.closing)

    def blocks_in(self, layer: nn.Module) -> list[nn.Module]:
        """Return those of ``blocks`` that a layer has."""
        held = dict(layer.named_modules())
        return [held[name] for name in self.blocks if name in held]


def _submodule(model: Any, path: str) -> Any:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise UsageError(
            f"a {model.config.model_type} model has no '{path}': this version does not know where it keeps its layers"
        ) from None


@dataclass(frozen=True)
class LayerPlace:
    """Says where layers are, below the base model, and which of their modules are the FFN.

    Attributes:
        layer: the path of a layer; in a description with ``{}`` for its number.
        first: the module whose place experts take, below the layer.
        ends: the module whose output is the FFN's, where that is another one.
        closing: the norm behind the sum of the stream and the FFN's output, if there is one.
    """

    layer: str
    first: str
    ends: str | None = None
    closing: str | None = None


@dataclass(frozen=True)
class ListedPaths(ModulePaths):
    """Numbers all layers through, in the order of ``places``. Only :meth:`found_in` a model is known how many there are.

    Args:
        places: patterns of layers, and in what :meth:`found_in` returns, the layers, below the whole model.
        known: whether ``places`` are layers.
    """

    body: str = ""
    places: tuple[LayerPlace, ...] = ()
    known: bool = False

    def found_in(self, model: Any) -> ListedPaths:
        """Return the paths of a model, with its FFNs or with experts in their place."""
        base = model.base_model
        prefix = f"{model.base_model_prefix}." if base is not model else ""
        found: dict[str, LayerPlace] = {}
        for place in self.places:
            for path in numbered(base, place.layer):
                if submodule(base, f"{path}.{place.first}") is not None:
                    found.setdefault(path, replace(place, layer=f"{prefix}{path}"))
        places = tuple(found.values())
        blocks = tuple(dict.fromkeys(place.first for place in places))
        return replace(self, body=prefix[:-1], blocks=blocks, places=places, known=True)

    def layer(self, index: int) -> str:
        """Return the path of one layer."""
        return self.places[index].layer

    def block_of(self, index: int, which: int = 0) -> str:
        """Return the path of the module whose place experts take."""
        return f"{self.layer(index)}.{self.places[index].first}"

    def place(self, index: int) -> LayerPlace:
        """See :class:`~upcycle.architectures.module_paths.ModulePaths`."""
        return self.places[index]

    def layer_of(self, name: str) -> int | None:
        """Return the index of the layer that a tensor or module belongs to; None outside the layers."""
        head = name
        while head:
            head = head.rpartition(".")[0]
            if head in self._numbers:
                return self._numbers[head]
        return None

    def has(self, name: str) -> bool:
        """Return True: nothing of such a model is another part."""
        return True

    def layers_in(self, model: Any) -> Any:
        """Return the layers, in their order."""
        return [model.get_submodule(place.layer) for place in self.places]

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {place.layer: index for index, place in enumerate(self.places)} if self.known else {}


def numbered(base: Any, pattern: str) -> Iterator[str]:
    """Yield the paths of the modules that a pattern with ``{}`` for numbers names, from 0 up to the first that is missing."""
    head, braces, tail = pattern.partition("{}")
    if not braces:
        if submodule(base, pattern) is not None:
            yield pattern
        return
    for i in count():
        if submodule(base, f"{head}{i}") is None:
            return
        yield from numbered(base, f"{head}{i}{tail}")


def submodule(base: Any, path: str) -> Any | None:
    """Return a module below another one, or None."""
    try:
        return base.get_submodule(path)
    except AttributeError:
        return None


def check_layers(layers: int, specs: Mapping[str, TensorSpec], paths: ModulePaths, where: str) -> None:
    """Refuse a number of layers that the weights do not have, before anything is built or listed per layer.

    Args:
        layers: the number in ``config.json``.
        specs: the stored tensors, by name.
        paths: where the architecture keeps its layers.
        where: the model's name in messages.

    Raises:
        CheckpointError: the weights have another number of layers.
    """
    found = {layer for layer in map(paths.layer_of, specs) if layer is not None}
    if found and layers != max(found) + 1:
        raise CheckpointError(
            f"{where}: config.json says 'num_hidden_layers' is {layers}, the weights have {max(found) + 1} layers",
            hint=BELONG_TOGETHER,
        )


def compare_tensors(
    expected: Mapping[str, tuple[int, ...]],
    specs: Mapping[str, TensorSpec],
    unexpected: Sequence[str],
    family: str,
    where: str,
    hint: str,
) -> None:
    """Refuse a checkpoint whose tensors are not those that are expected.

    Args:
        expected: the shape of every tensor that must be there.
        specs: those that are.
        unexpected: those that are there and belong to no part of the model.
        family: the architecture's name in messages.
        where: the checkpoint's.
        hint: what explains unexpected tensors.

    Raises:
        CheckpointError: a tensor is missing, unexpected, or of another shape; the message names it.
    """
    for name, shape in expected.items():
        if name not in specs:
            whole = where.endswith(".gguf")  # which holds its own configuration
            hint = "the file is incomplete: download it again" if whole else BELONG_TOGETHER
            raise CheckpointError(f"{where}: tensor '{name}' is missing", hint=hint)
        if specs[name].shape != shape:
            raise CheckpointError(
                f"{where}: tensor '{name}' has shape {shortened(list(specs[name].shape))}, config.json says {list(shape)}",
                hint=BELONG_TOGETHER,
            )
    if unexpected:
        more = f" ({len(unexpected)} such tensors)" if len(unexpected) > 1 else ""
        raise CheckpointError(
            f"{where}: tensor '{shortened(unexpected[0])}' is not part of a {family} model and would be lost{more}",
            hint=hint,
        )


def find_module_paths(model_type: str) -> ModulePaths:
    """Return the description of the family, target or described model of this ``model_type``; Llama's for any other."""
    for kind in ("target", "family"):
        if (architecture := find(kind, model_type)) is not None:
            found: ModulePaths = architecture.module_paths
            return found
    described = find("described", model_type)
    paths: ModulePaths = ModulePaths() if described is None else described.module_paths
    return paths


def text_config(config: Any) -> Any:
    """Return the stock configuration of a model's text model: of a model of parts the part, of any other the whole."""
    return getattr(config, "text_config", None) or config


def module_paths_of(config: Any) -> ModulePaths:
    """Return the description of the stock model that a stock configuration is of.

    Of a model of parts, it is that of its text model. One of upcycle's own classes has its parts where its base has them. An
    encoder without a head has no prefix before the paths.
    """
    base = base_type(config)
    wrapper = find("wrapper", base)
    if wrapper is not None:
        return find_module_paths(text_config(config).model_type).inside(wrapper.body)
    described = find("described", base)
    if described is None and base != config.model_type and base not in FAMILIES:
        return _replaced(config.replaced_ffns)
    return find_module_paths(base) if described is None or find("family", base) else described_paths(described, config)


def described_paths(described: Any, config: Any) -> ModulePaths:
    """Return the paths of a model that is described by its FFNs alone; an encoder without a head has no prefix before them."""
    paths: ModulePaths = described.module_paths
    from upcycle.architectures.stock_auto import class_name, is_encoder

    encoder = described.encoder or (described.both_ways is not None and is_encoder(config))
    bare = described.paths is not None and encoder and class_name(config).endswith("Model")
    return paths.without_prefix() if bare else paths


def module_paths_in(model: Any) -> ModulePaths:
    """Return the same for a stock model in memory (or on the meta device), which tells how many layers it has."""
    return module_paths_of(model.config).found_in(model)


def _replaced(entries: list[dict[str, Any]]) -> ListedPaths:
    """Return the paths of the layers that have experts, of a model whose FFNs nobody described, by ``replaced_ffns``."""
    places = []
    ffns = (entry for entry in entries if not entry.get("projection"))
    for modules in (modules for entry in ffns for modules in entry["paths"]):
        numbered_part = re.match(r"(.*\.)?\d+(?=\.)", modules[0].rpartition(".")[0] + ".")
        layer = numbered_part[0] if numbered_part else modules[0].rpartition(".")[0]
        below = [path.removeprefix(f"{layer}.") for path in modules]
        places.append(LayerPlace(layer, below[0], below[-1] if len(below) > 1 else None))
    return ListedPaths(places=tuple(places))
