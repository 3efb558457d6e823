"""A model that is opened without its weights, and then read layer by layer, is what a whole load gives: every bit, every dtype."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pico_models import PICO, PICO_MOE

from upcycle.models.load import load_model, open_layers

Pico = Callable[..., Path]
DTYPES = [torch.float32, torch.bfloat16]


def same(folder: Path, dtype: torch.dtype) -> None:
    layers = open_layers(folder, dtype, "auto")
    whole = load_model(folder, dtype, experts="auto", training=True)
    if layers is None:  # some weights stay in fp32, whatever is asked for
        assert len({weight.dtype for weight in whole.parameters()}) > 1
        return
    assert all(weight.is_meta for weight in layers.model.parameters())
    layers.load_outside()
    for index in range(len(layers)):
        layers.load(index)
    found, wanted = layers.model, whole
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = (dict(getattr(model, kind)()) for model in (found, wanted))
        assert list(ours) == list(theirs)
        for name, value in theirs.items():
            assert ours[name].dtype == value.dtype, name
            assert torch.equal(ours[name], value), name
    assert found.training
    assert found.config.use_cache is False
    assert found.config._experts_implementation == wanted.config._experts_implementation
    assert not layers.unexpected


@pytest.mark.one_in(17)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", PICO)
def test_dense(name: str, dtype: torch.dtype, pico: Pico) -> None:
    same(pico(name), dtype)


@pytest.mark.one_in(9)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", PICO_MOE)
def test_moe(name: str, dtype: torch.dtype, pico_moe: Pico) -> None:
    same(pico_moe(name), dtype)


def test_a_weight_that_the_class_lacks_is_noticed(dense: Path) -> None:
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    layers = open_layers(dense, torch.float32, "auto")
    assert layers is not None
    layers.load_outside()
    layers.load(0)
    assert any("layers.1." in name for name in layers.unexpected)
