"""A teacher whose weights are divided says what the whole one says, and holds no whole layer between passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed")

from upcycle.models.load import load_model, open_layers
from upcycle.trainers.distillation.frozen_shards import FrozenShards
from upcycle.trainers.distillation.losses import capture_outputs
from upcycle.trainers.distributed.ranks import process_group

Model = Callable[..., Path]


@pytest.mark.parametrize("name", ["llama", pytest.param("gemma", marks=pytest.mark.long)])
def test_the_same_outputs(name: str, pico: Model) -> None:
    ids = torch.arange(2, 26)[None] * 5
    whole = load_model(pico(name), experts="auto", training=True).eval()
    wanted = capture_outputs(whole)
    with torch.no_grad():
        logits = whole(ids).logits
    layers = open_layers(pico(name), torch.float32, "auto")
    assert layers is not None
    with process_group(60.0) as ranks:
        shards = FrozenShards(layers, ranks)
        assert shards.own_bytes == sum(weight.nbytes for weight in whole.parameters())  # of one rank of one
        found = capture_outputs(shards.model)
        for _ in range(2):  # whatever a pass gathered is gathered again
            with torch.no_grad():
                assert torch.equal(shards.model(ids).logits, logits)
            assert not sum(weight.numel() for weight in shards.model.parameters())
    for ours, theirs in zip(found.take(), wanted.take(), strict=False):
        assert torch.equal(ours.value, theirs.value)
