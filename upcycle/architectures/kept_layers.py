"""Says what the configuration of a Mixture-of-Experts is without some of its decoder layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from upcycle.architectures.module_paths import text_config
from upcycle.architectures.stock import build_config
from upcycle.architectures.stored_moe import MoeModel

_FIRST = ("first_k_dense_replace", "num_dense_layers")  # so many layers, the first ones, have no experts
_ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")


def kinds_of_layers(model: MoeModel) -> dict[str, list[Any]]:
    """Return the settings of the stock configuration that say something of every layer, one entry each."""
    return {
        key: list(value)
        for key, value in vars(model.stock).items()
        if "layer" in key
        and not key.startswith(("mtp", "mlp_only"))
        and isinstance(value, (list, tuple))
        and len(value) == model.layers
    }


def needed_layers(model: MoeModel) -> list[list[int]]:
    """Return sets of layers of each of which one must stay: those with experts, and, where some layers are no attention, the others.

    Stock classes that mix attention with convolutions or linear attention ask an attention layer how long their cache is. The first
    layers of Qwen3-VL must stay: the encoder's features are added behind each of them, by their numbers.
    """
    kinds = kinds_of_layers(model).get("layer_types", [])
    attention = [layer for layer, kind in enumerate(kinds) if kind in _ATTENTION]
    vision: Any = getattr(build_config(model.raw, model.family.name), "vision_config", None)
    fed = min(len(getattr(vision, "deepstack_visual_indexes", None) or ()), model.layers)
    mixed = [attention] if 0 < len(attention) < model.layers else []
    return [model.moe_layers, *mixed, *([layer] for layer in range(fed))]


def config_of_layers(model: MoeModel, kept: Sequence[int]) -> dict[str, Any]:
    """Return the ``config.json`` of a model that has the layers ``kept``, ascending, alone.

    Lists with one entry per layer are cut, layers without experts are numbered anew, and where a rule over layer numbers
    (``sliding_window_pattern``, ``decoder_sparse_step``) would now mean other layers, the layers are listed.
    """
    if len(kept) == model.layers:
        return model.family.with_text(model.raw, {})
    raw = model.family.text(model.raw)
    config, stock = {key: value for key, value in raw.items() if key != "auto_map"}, model.stock
    config["num_hidden_layers"] = len(kept)
    wanted = {key: [values[layer] for layer in kept] for key, values in kinds_of_layers(model).items()}
    config |= {key: values for key, values in wanted.items() if key in config}
    if "max_window_layers" in config and (
        kinds := wanted.get("layer_types")
    ):  # which loaders before transformers 5 read
        config["max_window_layers"] = next(
            (i for i, kind in enumerate(kinds) if kind == "sliding_attention"), len(kept)
        )
    for key in _FIRST:
        if (count := getattr(stock, key, None)) is not None or (count := config.get(key)) is not None:
            config[key] = sum(layer < count for layer in kept)
    if getattr(stock, "mlp_only_layers", None) is not None:
        config["mlp_only_layers"] = [place for place, layer in enumerate(kept) if layer not in model.moe_layers]
        if "decoder_sparse_step" in config:
            config["decoder_sparse_step"] = 1
    tried = model.family.with_text(model.raw, {k: v for k, v in config.items() if k not in wanted or k in raw})
    made = text_config(build_config(tried, model.family.name))
    config |= {key: values for key, values in wanted.items() if list(getattr(made, key, None) or []) != values}
    return model.family.with_text(model.raw, config)
