"""Counts the states that an encoder of images makes of one image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from upcycle.architectures.stock import empty_model


def image_states(raw: Mapping[str, Any], where: str) -> int:
    """Return how many states the stock model of a ``config.json`` makes of an image: its patches and special tokens.

    The model runs on the meta device, without memory.
    """
    model = empty_model(raw, where).eval()
    config = model.config
    size = config.image_size
    shape = (1, config.num_channels, *((size, size) if isinstance(size, int) else size))
    with torch.no_grad():
        states = model.base_model(pixel_values=torch.empty(shape, device="meta")).last_hidden_state
    return int(states.shape[1])
