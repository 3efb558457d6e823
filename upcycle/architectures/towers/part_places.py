"""Where models of parts keep the FFNs of encoders of images and of connectors: plain data, checked by numbers in a contract test."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from upcycle.architectures.described.ffn_place import FfnPlace
from upcycle.architectures.module_paths import numbered, submodule
from upcycle.errors import RefusalError

_TOWERS = ("vision_tower", "vision_tower.vision_model", "vision_model", "vision_encoder", "visual")
_FC: dict[str, Any] = {"up": "mlp.fc1", "down": "mlp.fc2", "whole": "mlp"}
_LIN: dict[str, Any] = {"up": "mlp.lin1", "down": "mlp.lin2", "whole": "mlp"}
_LINEAR_FC: dict[str, Any] = {"up": "mlp.linear_fc1", "down": "mlp.linear_fc2", "whole": "mlp"}


def _gated(ffn: str) -> dict[str, Any]:
    return {"gate": f"{ffn}.gate_proj", "up": f"{ffn}.up_proj", "down": f"{ffn}.down_proj", "whole": ffn}


# The layers of encoders, below these.
_VISION = (
    FfnPlace("encoder.layers.{}", **_FC, norm="layer_norm2"),  # CLIP, SigLIP and their like
    FfnPlace("encoder.layer.{}", **_FC, norm="layernorm_after|norm2"),  # InternVL, DINOv2
    FfnPlace("layers.{}", **_FC, norm="layernorm_after"),  # ViT
    FfnPlace("transformer.layers.{}", **_gated("feed_forward"), norm="ffn_norm"),  # Pixtral
    FfnPlace("transformer.encoder.layers.{}", **_gated("ffn"), norm="rms_norm2"),  # Ovis 2
    FfnPlace("layers.{}", **_LIN, norm="layer_norm2"),  # SAM
    FfnPlace("blocks.{}", **_gated("mlp"), norm="norm2"),  # Qwen2.5-VL
    FfnPlace("blocks.{}", **_LINEAR_FC, norm="norm2"),  # Qwen3-VL
)
_PROJECTOR: dict[str, Any] = {"up": "linear_1", "act": "act", "down": "linear_2"}
_MERGER: dict[str, Any] = {"up": "linear_fc1", "act": "act_fn", "down": "linear_fc2", "activation": "=gelu"}
_MODALITY: dict[str, Any] = {**_gated("modality_projection"), "config": "text_config"}
_RESAMPLER: dict[str, Any] = {**_gated("mlp"), "norm": "post_attention_layernorm", "config": "perceiver_config"}
_CONNECTORS = (
    FfnPlace("multi_modal_projector", **_PROJECTOR, activation="projector_hidden_act"),
    FfnPlace("vision_projection", **_PROJECTOR, activation="=gelu"),  # LightOnOCR
    FfnPlace("connector", **_MODALITY),  # Idefics2
    FfnPlace("connector.perceiver_resampler.layers.{}", **_RESAMPLER),
    FfnPlace("visual.merger", up="mlp.0", act="mlp.1", down="mlp.2", activation="=gelu"),  # Qwen2.5-VL
    FfnPlace("visual.merger", **_MERGER),  # Qwen3-VL
    FfnPlace("visual.deepstack_merger_list.{}", **_MERGER),
)
# What is a connector, for what is said of one that is no MLP.
_ANY_CONNECTOR = ("multi_modal_projector", "connector", "embed_vision", "visual_embeddings_table")


_NEW_LINE = "image_newline"  # what LLaVA-NeXT puts behind each row of an image


def is_connector(path: str) -> bool:
    """Return whether a module or parameter, by its path below the base model, leads from an encoder to the text model."""
    known = (*(place.layer.removesuffix(".{}") for place in _CONNECTORS), *_ANY_CONNECTOR, _NEW_LINE)
    return any(path == one or path.startswith(f"{one}.") for one in known)


class PartPlaces(NamedTuple):
    """The FFNs of one part: their descriptions, or why it has none that experts can stand for."""

    places: tuple[FfnPlace, ...] = ()
    why: str = ""


def vision_places(base: Any) -> PartPlaces:
    """Return the FFNs of the encoder of images of a stock model; ``base`` is its base model."""
    towers = [tower for tower in _TOWERS if submodule(base, tower) is not None]
    if not towers:
        return PartPlaces(why="it reads no images: it has no such encoder")
    found = [
        _below(tower, place) for tower in towers for place in _VISION if _has(base, _below(tower, place).layer, place)
    ]
    if found:
        return PartPlaces(tuple(found))
    return PartPlaces(why=f"no FFN of a known form is in its layers, below '{towers[0]}'")


def connector_places(base: Any, config: Any) -> PartPlaces:
    """Return the FFNs of the connector of a stock model.

    Args:
        base: its base model.
        config: its configuration.
    """
    found = [place for place in _CONNECTORS if _has(base, place.layer, place)]
    for place in found:
        layer = next(numbered(base, place.layer))
        up, down = (base.get_submodule(f"{layer}.{path}") for path in (place.up, place.down))
        if up.weight.shape[0] != down.weight.shape[1]:
            return PartPlaces(
                why=f"'{layer}' is no MLP of two projections: it computes a gate itself between '{place.up}', which makes "
                f"{up.weight.shape[0]:,} numbers, and '{place.down}', which reads {down.weight.shape[1]:,}"
            )
    if found:
        return PartPlaces(tuple(found))
    held = [path for path in _ANY_CONNECTOR if submodule(base, path) is not None]
    if held:
        return PartPlaces(why=f"'{held[0]}' is no MLP of two projections with an activation between them")
    return PartPlaces(why=f"a {config.model_type} model has none: its encoder leads to the text model by itself")


def _below(tower: str, place: FfnPlace) -> FfnPlace:
    return replace(place, layer=f"{tower}.{place.layer}", config="vision_config")


def _has(base: Any, layer: str, place: FfnPlace) -> bool:
    """Return whether the first such layer has the projections of a description."""
    first = next(numbered(base, layer), None)
    paths = (place.up, place.down, *filter(None, (place.gate, place.act)))
    return first is not None and all(
        getattr(submodule(base, f"{first}.{path}"), "weight", None) is not None or path == place.act for path in paths
    )


def text_places(base: Any, body: str, described: tuple[FfnPlace, ...], config: Any) -> tuple[FfnPlace, ...]:
    """Return the places of a described text model as a part of a model.

    Args:
        base: the model's base model.
        body: the path of the text model below it.
        described: the places of the text model alone.
        config: the text model's configuration.
    """
    fitting = (place for place in described if place.when is None or getattr(config, place.when[0]) == place.when[1])
    return tuple(
        replace(place, layer=f"{body}.{place.layer}", config=place.config or "text_config", when=None)
        for place in fitting
        if next(numbered(base, f"{body}.{place.layer}"), None) is not None
    )


def refuse_part(name: str, part: str, why: str, able: tuple[str, ...]) -> RefusalError:
    """Return the refusal of a part that experts cannot stand in."""
    return RefusalError(
        f"part: '{part}' of a {name} model cannot be converted: {why}",
        hint=f"part: {', '.join(able)}" + (", or all" if len(able) > 1 else ""),
    )
