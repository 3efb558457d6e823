"""What is read a layer at a time is what ``from_pretrained`` reads, for every family and every stock MoE."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from any_moe import auto_class_of
from pico_models import PICO, PICO_MOE

from upcycle.architectures.module_paths import module_paths_of
from upcycle.errors import CheckpointError
from upcycle.models.stock_layers import FolderLayers
from upcycle.models.stock_model import StockModel

Pico = Callable[..., Path]


def check(folder: Path) -> None:
    layers = FolderLayers(folder)
    whole: Any = auto_class_of(folder).from_pretrained(folder, dtype=torch.float32).eval()
    stack = module_paths_of(layers.model.config).layers_in(layers.model)
    for index in range(len(stack)):
        layers.load(index)
    found, expected = layers.model.state_dict(), whole.state_dict()
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    streamed, ids = StockModel(layers.model, layers), torch.arange(2, 42)[None] * 5
    with torch.no_grad():
        logits = StockModel(whole).logits(ids)
    assert torch.equal(streamed.logits(ids), logits)
    torch.testing.assert_close(streamed.logits(ids, 3), logits[:, -3:])  # a product of other shape rounds otherwise
    assert all(weight.is_meta for weight in stack[0].parameters())


@pytest.mark.one_in(9)
@pytest.mark.parametrize("name", PICO)
def test_dense(name: str, pico: Pico) -> None:
    check(pico(name))


@pytest.mark.one_in(7)
@pytest.mark.parametrize("fused", [False, True], ids=["single", "fused"])
@pytest.mark.parametrize("name", PICO_MOE)
def test_moe(name: str, fused: bool, pico_moe: Pico) -> None:
    check(pico_moe(name, fused=fused))


def test_a_weight_that_stock_does_not_find_is_named(dense: Path) -> None:
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "attention_bias": True}))
    layers = FolderLayers(dense)
    with pytest.raises(CheckpointError, match=r"finds no weight for 'model\.layers\.1\.self_attn\.q_proj\.bias'"):
        layers.load(1)
    (dense / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(CheckpointError, match="cannot use a weight"):
        FolderLayers(dense).load(0)
