"""Computes the shapes of the tensors that a stock class holds, from its configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from upcycle.architectures.module_paths import find_module_paths
from upcycle.architectures.stock import build_config, empty_model

StateDict = dict[str, torch.Tensor]


def stock_shapes(raw: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the stored names and shapes of all tensors of a configuration's stock class; the head only where it is not tied."""
    settings = build_config(raw, "config.json")
    model = empty_model(settings, "config.json")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    paths = find_module_paths(settings.model_type)
    head = shapes.pop(f"{paths.head}.weight")
    return shapes if settings.tie_word_embeddings else {**shapes, paths.head_weight: head}
