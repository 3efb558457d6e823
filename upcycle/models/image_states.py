"""Counts the states that an encoder of images makes of one image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from upcycle.architectures.described.find_ffns import find_ffns
from upcycle.architectures.stock import empty_model
from upcycle.files.formats.settings import base_type
from upcycle.models.model_inputs import states_model
from upcycle.registry import find


def image_states(raw: Mapping[str, Any], where: str) -> int:
    """Return how many states of an image the FFNs of a described model read, in the mean over its layers.

    These are its patches and special tokens; encoders in stages have fewer of them in every stage. The model runs on the meta
    device, without memory.
    """
    model = empty_model(raw, where).eval()
    config = getattr(model.config, "vision_config", None) or model.config
    size = config.image_size
    shape = (1, config.num_channels, *((size, size) if isinstance(size, int) else size))
    ran: list[int] = []
    described = find("described", base_type(model.config))
    assert described is not None
    for ffn in find_ffns(model, described):
        first = model.base_model.get_submodule(ffn.replaced[0])
        first.register_forward_pre_hook(lambda _, args, width=ffn.hidden: ran.append(args[0].numel() // width))
    body = getattr(model.base_model, "vision_model", None) or states_model(model)
    with torch.no_grad():
        body(pixel_values=torch.empty(shape, device="meta"))
    return max(1, round(sum(ran) / len(ran)))
