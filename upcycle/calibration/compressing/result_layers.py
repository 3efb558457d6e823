"""Runs the model that a compression will write, layer by layer, before it is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from upcycle.architectures.module_paths import module_paths_of
from upcycle.architectures.stock import build_config, empty_model
from upcycle.methods.growing.base import Piece
from upcycle.models.stock_layers import compute_buffers, compute_layer_buffers

if TYPE_CHECKING:
    from upcycle.architectures.tensor_origin import Origin
    from upcycle.checkpoints.moe_checkpoint import MoeCheckpoint


class ResultLayers:
    """Gives the layers of the result their weights, made of the MoE's tensors as they will be written.

    Args:
        checkpoint: the MoE.
        config: the ``config.json`` of the result.
        pieces: its tensors.
        dtype: the dtype that it is written in, as a recipe means it.
        blocks: reads a tensor; None: the checkpoint does.
    """

    def __init__(
        self,
        checkpoint: MoeCheckpoint,
        config: Mapping[str, Any],
        pieces: Sequence[Piece],
        dtype: str,
        blocks: Callable[[Origin], Iterator[torch.Tensor]] | None = None,
    ) -> None:
        self.model: Any = empty_model(build_config(config, "config.json"), "config.json", torch.float32).eval()
        compute_buffers(self.model)
        self._blocks = blocks or partial(checkpoint.blocks, dtype=dtype)
        self._pieces = {piece.layer: piece for piece in pieces if piece.layer is not None}
        self._paths = module_paths_of(self.model.config)
        self._layers = self._paths.layers_in(self.model)
        self._dtypes: dict[str, torch.dtype] = {}

    def inner(self, index: int, name: str) -> str:
        """Return the path, inside a layer, of the module that a weight belongs to."""
        return name.removeprefix(f"{self._paths.layer(index)}.").removesuffix(".weight")

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype that a loaded tensor is written in."""
        return self._dtypes[name]

    def load(self, index: int) -> None:
        """See :class:`upcycle.models.stock_layers.Layers`."""
        state, prefix = {}, f"{self._paths.layer(index)}."
        for name, origin in self._pieces[index].tensors.items():
            whole = torch.cat([*self._blocks(origin)])
            self._dtypes[name] = whole.dtype
            state[name.removeprefix(prefix)] = whole.float()
        self._layers[index].load_state_dict(state, strict=True, assign=True)
        compute_layer_buffers(self.model, index)

    def drop(self, index: int) -> None:
        """See :class:`upcycle.models.stock_layers.Layers`."""
        self._layers[index].to("meta")
