"""Encoders of images, and of images and text."""

from __future__ import annotations

from typing import Any

from upcycle.architectures.described.ffn_place import DescribedModel, FfnPlace
from upcycle.architectures.module_paths import ModulePaths

_FC: dict[str, Any] = {"up": "mlp.fc1", "down": "mlp.fc2", "whole": "mlp"}


def _images(body: str, layers: str) -> dict[str, Any]:
    """Where an encoder of images has its parts."""
    paths = ModulePaths(
        body=body,
        final_norm="",
        layers=f"{body}.{layers}",
        embedding=f"{body}.embeddings.patch_embeddings.projection",
    )
    return {"paths": paths, "encoder": True, "reads": "images"}


def _stages(name: str, title: str, place: FfnPlace) -> DescribedModel:
    """Return an encoder in stages, whose layers grow wider."""
    return DescribedModel(name, title, (place,), encoder=True, reads="images", pauses=True)


def _two_towers(name: str, title: str) -> DescribedModel:
    places = (
        FfnPlace(f"{tower}_model.encoder.layers.{{}}", **_FC, norm="layer_norm2", config=f"{tower}_config")
        for tower in ("text", "vision")
    )
    return DescribedModel(
        name,
        title,
        tuple(places),
        encoder=True,
        reads="images and text",
        parts=(("text", "text_model."), ("vision", "vision_model.")),
        pauses=True,
    )


VIT = DescribedModel("vit", "ViT", (FfnPlace("layers.{}", **_FC, norm="layernorm_after"),), **_images("vit", "layers"))
DEIT = DescribedModel(
    "deit", "DeiT", (FfnPlace("layers.{}", **_FC, norm="layernorm_after"),), **_images("deit", "layers")
)
DINOV2 = DescribedModel(
    "dinov2",
    "DINOv2",
    (FfnPlace("encoder.layer.{}", **_FC, norm="norm2"),),
    **_images("dinov2", "encoder.layer"),
    pauses=True,
)
_PROJECTIONS: dict[str, Any] = {"up": "mlp.up_proj", "down": "mlp.down_proj", "whole": "mlp", "norm": "norm2"}
DINOV3 = DescribedModel(
    "dinov3_vit",
    "DINOv3",
    (
        FfnPlace("layer.{}", **_PROJECTIONS, gate="mlp.gate_proj"),
        FfnPlace("layer.{}", **_PROJECTIONS, unless="mlp.gate_proj"),
    ),
    encoder=True,
    reads="images",
    pauses=True,
)
SWIN = _stages("swin", "Swin", FfnPlace("encoder.layers.{}.blocks.{}", **_FC, norm="layernorm_after"))
CONVNEXT = _stages(
    "convnext",
    "ConvNeXt",
    FfnPlace("encoder.stages.{}.layers.{}", "pwconv1", "pwconv2", act="act", norm="layernorm"),
)
DINOV3_CONVNEXT = _stages(
    "dinov3_convnext",
    "DINOv3 ConvNeXt",
    FfnPlace("stages.{}.layers.{}", "pointwise_conv1", "pointwise_conv2", act="activation_fn", norm="layer_norm"),
)
CLIP = _two_towers("clip", "CLIP")
SIGLIP = _two_towers("siglip", "SigLIP")
