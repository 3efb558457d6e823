"""Stock models with random weights: what one computes is noise, how long that takes is not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from upcycle.architectures.stock import build_config, empty_model
from upcycle.models.first_calls import settle_code_paths
from upcycle.models.stock_layers import compute_buffers

_SPREAD = 0.02  # of the weights: activations stay ordinary numbers, which processors multiply at their usual speed


class WeightPool:
    """Weights that several models share: those of the same name and shape, such as embeddings and attention."""

    def __init__(self) -> None:
        self._rng = torch.Generator().manual_seed(0)
        self._made: dict[tuple[str, torch.Size, torch.dtype], torch.nn.Parameter] = {}

    def missing(self, weights: Mapping[str, torch.Tensor], dtype: torch.dtype) -> int:
        """Return the bytes of those weights, by name, that are not here yet."""
        new = (w.numel() for name, w in weights.items() if (name, w.shape, dtype) not in self._made)
        return sum(new) * dtype.itemsize

    def weight(self, name: str, shape: torch.Size, dtype: torch.dtype) -> torch.nn.Parameter:
        """Return small normal numbers, or ones for a vector: a norm's factors, or a bias."""
        key = (name, shape, dtype)
        if key not in self._made:
            filled = torch.ones(shape, dtype=dtype)
            if len(shape) > 1:
                filled.normal_(0.0, _SPREAD, generator=self._rng)
            self._made[key] = torch.nn.Parameter(filled)
        return self._made[key]


def random_model(
    config: Mapping[str, Any], dtype: torch.dtype, pool: WeightPool, check_room: Callable[[int], None]
) -> Any:
    """Build the stock causal language model of a configuration with random weights, on the CPU.

    A router of such weights chooses all experts about equally often.

    Args:
        config: a ``config.json``.
        dtype: the dtype of the weights.
        pool: where weights are taken from, and kept for the next model.
        check_room: receives the bytes that will be needed, before they are.

    Raises:
        CheckpointError: transformers does not know such a model, or refuses a value.
    """
    settle_code_paths()
    settings = build_config(config, "config.json")
    model = empty_model(settings, "config.json", dtype)
    check_room(pool.missing(dict(model.named_parameters()), dtype))
    with torch.no_grad():
        first: dict[int, str] = {}  # tied weights have several names, and stay one
        for name, weight in list(model.named_parameters(remove_duplicate=False)):
            shared = first.setdefault(id(weight), name)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, pool.weight(shared, weight.shape, dtype))
        for name, buffer in list(model.named_buffers()):
            if buffer.is_meta:
                parent, _, leaf = name.rpartition(".")
                model.get_submodule(parent).register_buffer(leaf, torch.zeros(buffer.shape, dtype=buffer.dtype))
        compute_buffers(model)
    return model.eval()
