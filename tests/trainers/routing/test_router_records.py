"""Records are what stock routers computed: once, with gradients, under checkpointing and accumulation too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from upcycle.errors import UsageError
from upcycle.registry import TARGETS, load
from upcycle.trainers.routing.router_records import capture
from upcycle.trainers.routing.stock_routers import moe_layers


@pytest.mark.parametrize("target", TARGETS)
def test_records_are_the_stock_models_router_logits(target: str, stock: Any, ids: torch.Tensor) -> None:
    model = stock(target)
    with capture(model) as recorder:
        output = model(ids, output_router_logits=True)
        records = recorder.take()
    layers = moe_layers(model)
    assert [record.layer for record in records] == [layer.index for layer in layers]
    assert len(output.router_logits) == len(records)
    for record, stocks in zip(records, output.router_logits, strict=True):
        assert torch.equal(record.logits, stocks)
        assert record.weights.shape == record.experts.shape == (ids.numel(), 2)
        assert record.logits.requires_grad
        assert record.weights.requires_grad
        whole = load("target", target)().weight_sum
        torch.testing.assert_close(record.weights.sum(1), torch.full((ids.numel(),), whole), rtol=0, atol=1e-5)
        assert torch.equal(record.chosen.sum(1), torch.full((ids.numel(),), 2.0))
        assert record.scores.shape == record.probabilities.shape == (ids.numel(), 4)


@pytest.mark.parametrize("target", TARGETS)
def test_checkpointing_counts_once_and_gives_the_same_gradients(target: str, stock: Any, ids: torch.Tensor) -> None:
    found = []
    for checkpointing in (False, True):
        model = stock(target).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with capture(model) as recorder:
            loss = model(ids, labels=ids, use_cache=False).loss
            records = recorder.take()
            auxiliary = sum(record.logits.square().mean() + record.weights.square().mean() for record in records)
            (loss + auxiliary).backward()
            assert recorder.take() == []  # what the backward pass ran again
        assert len(records) == len(moe_layers(model))
        found.append([layer.router.get_parameter(_rows(layer.router)).grad.clone() for layer in moe_layers(model)])
    for plain, recomputed in zip(*found, strict=True):
        assert plain.abs().max() > 0
        assert torch.equal(plain, recomputed)


def _rows(router: torch.nn.Module) -> str:
    return next(name for name, _ in router.named_parameters())


def test_reentrant_checkpointing_is_refused(stock: Any, ids: torch.Tensor) -> None:
    model = stock("mixtral").train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with capture(model), pytest.raises(UsageError, match="reentrant") as caught:
        model(ids, use_cache=False)
    assert "use_reentrant" in str(caught.value.hint)


def test_every_forward_pass_has_records_of_its_own(stock: Any, ids: torch.Tensor) -> None:
    model = stock("mixtral")
    with capture(model) as recorder:
        model(ids)
        model(ids[:1])
        assert [len(record.logits) for record in recorder.take()] == [12] * 3
        with torch.no_grad():
            model(ids)  # a validation pass may run without gradients
        assert not any(record.logits.requires_grad for record in recorder.take())
    model(ids)
    assert recorder.take() == []


def test_a_failed_pass_leaves_nothing_open(stock: Any, ids: torch.Tensor) -> None:
    model = stock("mixtral")
    with capture(model) as recorder:
        with pytest.raises(TypeError):
            model(ids, labels="wrong")
        recorder.take()
        moe_layers(model)[0].router(torch.randn(3, 32))
        assert recorder.take() == []
