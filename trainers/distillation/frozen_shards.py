"""A frozen model whose weights are divided among the ranks, and gathered layer by layer while it runs.

Every rank holds one part of every layer's weights, one of those outside the layers, and, while a pass runs, one whole layer. The
model computes with the same numbers as an undivided one, so its outputs are the same to the last bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

from upcycle.architectures.module_paths import module_paths_in
from upcycle.hardware.memory import return_freed_memory
from upcycle.models.load import load_model, open_layers
from upcycle.models.stock_layers import FolderLayers, weights_of
from upcycle.trainers.checkpoints.divided_loading import read_part
from upcycle.trainers.distributed.ranks import Ranks


class FrozenShards:
    """Divides a model while it is read, and gathers what runs.

    All ranks must make it together, and then run the model equally often: whoever runs it needs the others' parts.

    Args:
        layers: the model with nothing loaded, the same on all ranks.
        ranks: all of them.

    Attributes:
        model: the model, frozen and in evaluation mode.

    Raises:
        CheckpointError: a weight is missing, of another shape, or none of the model's.
    """

    def __init__(self, layers: FolderLayers, ranks: Ranks) -> None:
        self.model: Any = layers.model.requires_grad_(False).eval()
        self._ranks = ranks
        self._parts: dict[int, torch.Tensor] = {}  # id of a weight -> this rank's part of it, flat
        self._shapes: dict[int, torch.Size] = {}
        for index in (None, *range(len(layers))):
            read_part(layers, index, ranks)
            for _, weight in weights_of(self.model, index):
                if isinstance(weight, nn.Parameter) and id(weight) not in self._parts:
                    self._divide(weight)
            return_freed_memory()
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(ranks.device)
        decoder = list(module_paths_in(self.model).layers_in(self.model))
        inside = {id(module) for layer in decoder for module in layer.modules()}
        outside = [m for m in self.model.modules() if id(m) not in inside and m._parameters]
        for module in (*decoder, *outside):
            held = [*module.parameters(recurse=id(module) in inside)]
            module.register_forward_pre_hook(lambda *_, held=held: self._gather(held))
            module.register_forward_hook(lambda *_, held=held: self._free(held), always_call=True)

    @property
    def own_bytes(self) -> int:
        """Bytes of weights that this rank keeps between passes."""
        return sum(part.nbytes for part in self._parts.values())

    def _divide(self, weight: nn.Parameter) -> None:
        """Send every rank its part of what the first rank has read, padded to parts of equal size."""
        world = self._ranks.world_size
        size = -(-weight.numel() // world)
        part = torch.empty(size, dtype=weight.dtype, device=self._ranks.device)
        if self._ranks.first:
            whole = weight.detach().flatten().to(self._ranks.device)
            whole = nn.functional.pad(whole, (0, size * world - whole.numel()))
            distributed.scatter(part, list(whole.chunk(world)) if size else [part] * world)
        else:
            distributed.scatter(part)
        self._parts[id(weight)], self._shapes[id(weight)] = part, weight.shape
        weight.data = torch.empty(0, dtype=weight.dtype, device=self._ranks.device)

    def _gather(self, held: list[nn.Parameter]) -> None:
        for weight in held:
            part, shape = self._parts[id(weight)], self._shapes[id(weight)]
            whole = part.new_empty(len(part) * self._ranks.world_size)
            distributed.all_gather_into_tensor(whole, part)
            weight.data = whole[: shape.numel()].view(shape)

    def _free(self, held: list[nn.Parameter]) -> None:
        for weight in held:
            weight.data = weight.data.new_empty(0)


def load_parent(folder: Path, dtype: torch.dtype, ranks: Ranks, divides: bool) -> Any:
    """Load a model that teaches: frozen, in evaluation mode, on the rank's device.

    Args:
        folder: its own.
        dtype: of its weights.
        ranks: all of them.
        divides: whether its weights are divided among them (:class:`FrozenShards`), where transformers need not load the whole.

    Raises:
        UpcycleError: it cannot be loaded.
    """
    layers = open_layers(folder, dtype, "auto", ranks.device) if divides else None
    if layers is not None:
        return FrozenShards(layers, ranks).model
    return load_model(folder, dtype, ranks.device, experts="auto", training=True).eval().requires_grad_(False)
