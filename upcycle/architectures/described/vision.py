"""Encoders of images, and of images and text."""

from __future__ import annotations

from typing import Any

from upcycle.architectures.described.ffn_place import DescribedModel, FfnPlace
from upcycle.architectures.module_paths import ModulePaths

_SCALED = "it scales what its FFN adds to the stream, by factors that can be zero"
_FC: dict[str, Any] = {"up": "mlp.fc1", "down": "mlp.fc2", "whole": "mlp"}


def _images(body: str, layers: str) -> dict[str, Any]:
    """Where an encoder of images has its parts."""
    paths = ModulePaths(
        body=body,
        final_norm="",
        layers=f"{body}.{layers}",
        embedding=f"{body}.embeddings.patch_embeddings.projection",
    )
    return {"paths": paths, "encoder": True, "images": True}


def _two_towers(norm: str) -> tuple[FfnPlace, ...]:
    return tuple(
        FfnPlace(f"{tower}_model.encoder.layers.{{}}", **_FC, norm=norm, config=f"{tower}_config")
        for tower in ("text", "vision")
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
    uncalibrated=_SCALED,
)
CLIP = DescribedModel("clip", "CLIP", _two_towers("layer_norm2"))
SIGLIP = DescribedModel("siglip", "SigLIP", _two_towers("layer_norm2"))
