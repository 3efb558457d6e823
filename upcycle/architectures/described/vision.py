"""Encoders of images, and of images and text."""

from __future__ import annotations

from typing import Any

from upcycle.architectures.described.ffn_place import DescribedModel, FfnPlace

_FC: dict[str, Any] = {"up": "mlp.fc1", "down": "mlp.fc2", "whole": "mlp"}


def _two_towers(norm: str) -> tuple[FfnPlace, ...]:
    return tuple(
        FfnPlace(f"{tower}_model.encoder.layers.{{}}", **_FC, norm=norm, config=f"{tower}_config")
        for tower in ("text", "vision")
    )


VIT = DescribedModel("vit", "ViT", (FfnPlace("layers.{}", **_FC, norm="layernorm_after"),))
DEIT = DescribedModel("deit", "DeiT", (FfnPlace("layers.{}", **_FC, norm="layernorm_after"),))
DINOV2 = DescribedModel("dinov2", "DINOv2", (FfnPlace("encoder.layer.{}", **_FC, norm="norm2"),))
CLIP = DescribedModel("clip", "CLIP", _two_towers("layer_norm2"))
SIGLIP = DescribedModel("siglip", "SigLIP", _two_towers("layer_norm2"))
