"""Stock models with random weights: what one computes is noise, how long that takes is not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from upcycle.architectures.stock import build_config, empty_model
from upcycle.models.first_calls import settle_code_paths
from upcycle.models.stock_layers import compute_buffers

_SPREAD = 0.02  # of the weights: activations stay ordinary numbers, which processors multiply at their usual speed


def random_model(config: Mapping[str, Any], dtype: torch.dtype, seed: int = 0) -> Any:
    """Build the stock causal language model of a configuration with small normal weights, on the CPU.

    Weights of norms are 1. A router of such weights chooses all experts about equally often.

    Args:
        config: a ``config.json``.
        dtype: the dtype of the weights.
        seed: of the weights.

    Raises:
        CheckpointError: transformers does not know such a model, or refuses a value.
    """
    settle_code_paths()
    settings = build_config(config, "config.json")
    model = empty_model(settings, "config.json", dtype)
    rng = torch.Generator().manual_seed(seed)
    made: dict[int, torch.nn.Parameter] = {}  # tied weights stay one tensor
    with torch.no_grad():
        for name, weight in list(model.named_parameters(remove_duplicate=False)):
            if id(weight) not in made:
                filled = torch.empty(weight.shape, dtype=dtype)
                _ = filled.normal_(0.0, _SPREAD, generator=rng) if weight.ndim > 1 else filled.fill_(1.0)
                made[id(weight)] = torch.nn.Parameter(filled, requires_grad=False)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, made[id(weight)])
        for name, buffer in list(model.named_buffers()):
            if buffer.is_meta:
                parent, _, leaf = name.rpartition(".")
                model.get_submodule(parent).register_buffer(leaf, torch.zeros(buffer.shape, dtype=buffer.dtype))
        compute_buffers(model, settings)
    return model.eval()
