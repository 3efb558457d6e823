"""Tells which tensors a stock class holds, from its configuration alone, and under which names it finds stored ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from upcycle.architectures.module_paths import paths_of
from upcycle.architectures.stock import build_config, empty_model

StateDict = dict[str, torch.Tensor]


def stock_shapes(raw: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of all tensors of a configuration's stock class; the head only where it is not tied."""
    settings = build_config(raw, "config.json")
    model = empty_model(settings, "config.json")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if settings.tie_word_embeddings:
        del shapes[paths_of(settings).head_weight]
    return shapes


def loaded_names(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """Return, by stored name, the name of the weight that transformers makes of that tensor, alone or with others."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    own, prefix = model.state_dict(), model.base_model_prefix
    return {name: rename_source_key(name, renamings, converters, prefix, own)[0] for name in stored}
