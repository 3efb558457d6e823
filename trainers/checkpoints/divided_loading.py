"""Gives every rank its own part of a model's weights while these are read, so that no rank ever holds the whole model.

The first rank reads: the weights outside the layers, then one layer after another. What was read goes to all ranks, each of which
keeps its part, as ZeRO-3 divides it, before the next layer is read. So a rank needs memory for its part, for one layer, and for
the largest tensor outside the layers, and the files are read once, whatever the number of ranks.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import distributed, nn

from upcycle.errors import CheckpointError, UpcycleError
from upcycle.hardware.memory import return_freed_memory
from upcycle.models.stock_layers import FolderLayers, compute_layer_buffers, weights_of
from upcycle.trainers.distributed.ranks import Ranks, import_deepspeed
from upcycle.trainers.routing.router_control import NOISE_WEIGHT


def only_in_training(name: str) -> bool:
    """Whether a weight of this name is in no file of a model: learned router noise, which begins at zero."""
    return name.endswith(f".{NOISE_WEIGHT}")


def divide_weights(layers: FolderLayers, config: Mapping[str, Any], ranks: Ranks) -> None:
    """Read a model whose weights are on the meta device, and divide every weight among the ranks as soon as it is read.

    All ranks must call it together, before the engine is made. What trains was chosen already, and stays chosen.

    Args:
        layers: the model with nothing loaded, the same on all ranks.
        config: DeepSpeed's configuration of the engine.
        ranks: all of them.

    Raises:
        CheckpointError: a weight is missing, of another shape, or none of the model's.
    """
    deepspeed, model = import_deepspeed(), layers.model
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    for index in (None, *range(len(layers))):
        read_part(layers, index, ranks)
        held = {id(w): w for name, w in weights_of(model, index) if isinstance(w, nn.Parameter)}
        for name, weight in weights_of(model, index):
            if isinstance(weight, nn.Parameter):
                weight.requires_grad_(name in trained)
        with redirect_stdout(io.StringIO()):
            deepspeed.zero.Init(module=nn.ParameterList(held.values()), config_dict_or_path=dict(config))
        return_freed_memory()
    for module in model.modules():  # DeepSpeed leaves buffers where they are if the weights were divided before
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(ranks.device)


def read_part(layers: FolderLayers, index: int | None, ranks: Ranks) -> None:
    """Read a part of a model on the first rank; the others get weights of the same shapes, and the first one's buffers.

    Args:
        layers: the model, the same on all ranks.
        index: of the layer, or (None) what is outside the layers.
        ranks: all of them, which call this together.

    Raises:
        CheckpointError: a weight is missing, of another shape, or none of the model's.
    """
    error: Exception | None = None
    try:
        if ranks.first:
            if index is None:
                layers.load_outside()
            else:
                layers.load(index)
            if layers.unexpected:
                raise CheckpointError(
                    f"the model has no weights for {sorted(layers.unexpected)[:3]}: an export would lose them",
                    hint="train a folder that stock transformers loads without a warning",
                )
    except (UpcycleError, OSError, RuntimeError) as fault:
        error = fault
    ranks.raise_together(error)
    _make_room(layers.model, index)
    for _, weight in weights_of(layers.model, index):
        if not isinstance(weight, nn.Parameter) and ranks.world_size > 1:
            value = weight.to(ranks.device)
            distributed.broadcast(value, 0)
            weight.copy_(value)


def _make_room(model: Any, index: int | None) -> None:
    """Give the weights of a layer, or (None) those outside the layers, memory where they have none: zeros for what no file holds."""
    made: dict[int, torch.Tensor] = {}
    for name, weight in weights_of(model, index):
        if weight.is_meta and id(weight) not in made:
            empty = torch.zeros_like if only_in_training(name) else torch.empty_like
            value = empty(weight, device="cpu", requires_grad=False)
            made[id(weight)] = nn.Parameter(value, weight.requires_grad) if isinstance(weight, nn.Parameter) else value
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, weight in held.items():
                if id(weight) in made:
                    held[name] = made[id(weight)]
    if index is not None:
        compute_layer_buffers(model, index)
