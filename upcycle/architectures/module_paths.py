"""Where a stock causal language model keeps its parts: one description per architecture, asked wherever one of them is needed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from upcycle.errors import CheckpointError, UsageError
from upcycle.registry import find

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from upcycle.files.formats.tensor_spec import TensorSpec

BELONG_TOGETHER = "compare config.json with the weights: do they belong together?"  # a hint


@dataclass(frozen=True)
class ModulePaths:
    """Dotted paths of a model's parts in its stock class; the defaults are Llama's, which most architectures share.

    With ``.weight`` they are the names of stored tensors, too.

    Args:
        body: everything but the head; it takes token ids or embeddings and returns hidden states.
        layers: the list of decoder layers.
        embedding: the table of token embeddings.
        final_norm: the norm behind the last layer.
        head: what makes logits of normed hidden states.
        blocks: the modules of a layer whose outputs add up to the FFN's, the dense FFN or the routed experts first. An
            architecture may have shared experts beside them.
    """

    body: str = "model"
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    blocks: tuple[str, ...] = ("mlp",)

    @property
    def embedding_weight(self) -> str:
        """The tensor ``[V, d]`` of token embeddings."""
        return f"{self.embedding}.weight"

    @property
    def final_norm_weight(self) -> str:
        """The tensor ``[d]`` of the norm behind the last layer."""
        return f"{self.final_norm}.weight"

    @property
    def head_weight(self) -> str:
        """The tensor ``[V, d]`` that makes logits; not stored where it is tied to the embeddings."""
        return f"{self.head}.weight"

    @property
    def block(self) -> str:
        """The first of ``blocks``: in a dense model its FFN."""
        return self.blocks[0]

    def layer(self, index: int) -> str:
        """The path of one decoder layer."""
        return f"{self.layers}.{index}"

    def block_of(self, index: int, which: int = 0) -> str:
        """The path of one of a layer's ``blocks``."""
        return f"{self.layers}.{index}.{self.blocks[which]}"

    def layer_of(self, name: str) -> int | None:
        """The index of the layer that a tensor or module lies in; None outside the layers."""
        match = self._in_a_layer.match(name)
        return int(match[1]) if match else None

    @cached_property
    def _in_a_layer(self) -> re.Pattern[str]:
        return re.compile(re.escape(self.layers) + r"\.(\d{1,9})\.")

    def renamed(self, name: str, other: ModulePaths) -> str:
        """The name that a tensor of this architecture has in ``other``; what is inside a layer keeps its own."""
        if (layer := self.layer_of(name)) is not None:
            return other.layer(layer) + name.removeprefix(self.layer(layer))
        for mine, its in (
            (self.embedding, other.embedding),
            (self.final_norm, other.final_norm),
            (self.head, other.head),
        ):
            if name.startswith(f"{mine}."):
                return its + name.removeprefix(mine)
        return name

    def body_in(self, model: Any) -> Any:
        """The module that gives hidden states.

        Raises:
            UsageError: the model is of an architecture that is not described, and that keeps it elsewhere.
        """
        return _submodule(model, self.body)

    def layers_in(self, model: Any) -> Any:
        """The list of decoder layers.

        Raises:
            UsageError: as :meth:`body_in`.
        """
        return _submodule(model, self.layers)

    def blocks_in(self, layer: nn.Module) -> list[nn.Module]:
        """Those of ``blocks`` that a layer has."""
        found = [getattr(layer, name, None) for name in self.blocks]
        return [block for block in found if block is not None]


def _submodule(model: Any, path: str) -> Any:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise UsageError(
            f"a {model.config.model_type} model has no '{path}': this version does not know where it keeps its layers"
        ) from None


def check_layers(layers: int, specs: Mapping[str, TensorSpec], paths: ModulePaths, where: str) -> None:
    """Refuse a number of layers that the weights do not have, before anything is built or listed per layer.

    Args:
        layers: what ``config.json`` says.
        specs: the stored tensors, by name.
        paths: where the architecture keeps its layers.
        where: what messages call the model.

    Raises:
        CheckpointError: the weights have another number of layers.
    """
    found = {layer for layer in map(paths.layer_of, specs) if layer is not None}
    if found and layers != max(found) + 1:
        raise CheckpointError(
            f"{where}: config.json says 'num_hidden_layers' is {layers}, the weights have {max(found) + 1} layers",
            hint=BELONG_TOGETHER,
        )


def find_module_paths(model_type: str) -> ModulePaths:
    """The description that a family or a target of this ``model_type`` carries; Llama's for what is neither."""
    for kind in ("target", "family"):
        if (architecture := find(kind, model_type)) is not None:
            found: ModulePaths = architecture.module_paths
            return found
    return ModulePaths()
