"""Layers whose experts stay in their files compute as those that are loaded as a whole, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_oracle import some_windows

from upcycle.calibration.compressing.experts_in_files import layers_with_experts_in_files
from upcycle.calibration.compressing.moe_walk import ExpertRun, MoeWalk, Routed
from upcycle.checkpoints.moe_checkpoint import MoeCheckpoint
from upcycle.models.stock_layers import layers_of

Models = Callable[..., Path]


def walked(walk: MoeWalk, windows: torch.Tensor) -> tuple[list[torch.Tensor], list[Routed], list[ExpertRun]]:
    """The streams behind all layers, seen and not, and what routers and experts did."""
    streams, routed, ran = [walk.embed(windows)], [], []
    walk.forget_embeddings()
    for index in range(len(walk.layers)):
        with walk.loaded(index):
            after = walk.run(index, streams[-1], routed.append, ran.append)
            assert torch.equal(after, walk.run(index, streams[-1]))
        streams.append(after)
    return streams, routed, ran


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("name", "dtype"), [("olmoe", "keep"), ("granitemoeshared", "bfloat16"), ("dots1", "keep")])
def test_streams_and_experts_are_those_of_whole_layers(name: str, dtype: str, fused: bool, pico_moe: Models) -> None:
    checkpoint, windows = MoeCheckpoint.open(str(pico_moe(name, fused))), some_windows()
    walks = (MoeWalk(open_(checkpoint, dtype), 24) for open_ in (layers_with_experts_in_files, layers_of))
    with torch.no_grad():
        (streams, routed, ran), (expected, theirs, whole) = (walked(walk, windows) for walk in walks)
    for found, other in (
        (streams, expected),
        *((vars(a).values(), vars(b).values()) for a, b in zip(ran, whole, strict=True)),
    ):
        assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(found, other, strict=True))
    assert len(routed) == len(theirs)
    assert ran


def test_no_weights_of_experts_are_loaded_with_a_layer(pico_moe: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    from upcycle.models.stock_layers import FolderLayers

    read: list[str] = []
    own: Any = FolderLayers._tensor
    monkeypatch.setattr(FolderLayers, "_tensor", lambda layers, name: [read.append(name), own(layers, name)][1])
    checkpoint = MoeCheckpoint.open(str(pico_moe("olmoe")))
    layers = layers_with_experts_in_files(checkpoint, "keep")
    layers.load(0)
    assert any(".self_attn." in name for name in read)
    assert not [name for name in read if ".experts." in name or "lm_head" in name]
    held = dict(layers.model.named_parameters())
    assert not [name for name in held if "layers.0" in name and ("experts" in name or held[name].is_meta)]
