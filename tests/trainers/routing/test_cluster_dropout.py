"""Cluster dropout: which experts are left in training, when others are, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from upcycle.errors import UsageError
from upcycle.trainers.recipe.part_recipes import ControlParameters
from upcycle.trainers.routing.cluster_dropout import survivors, without_dropped
from upcycle.trainers.routing.router_control import RouterControl
from upcycle.trainers.routing.router_records import RouterRecord, capture


def chosen(model: Any, ids: torch.Tensor, step: int = 0, **keys: Any) -> list[RouterRecord]:
    control = RouterControl(ControlParameters(**keys))
    control.step = step
    with capture(model, control) as recorder:
        model(ids, use_cache=False)
        records: list[RouterRecord] = recorder.take()
    control.detach()
    return records


@pytest.mark.parametrize(("size", "rate", "left"), [(8, 0.5, 4), (4, 0.1, 4), (4, 0.9, 1), (1, 0.5, 1), (3, 0.5, 1)])
def test_how_many_are_left(size: int, rate: float, left: int) -> None:
    assert survivors(size, rate) == left
    options = ControlParameters(cluster_dropout=rate, clusters=3)
    kept = without_dropped(torch.zeros(1, 3 * size), options, 1, 0).isfinite().view(3, size)
    assert kept.sum(1).tolist() == [left] * 3


def test_others_are_left_after_a_while_and_in_other_layers() -> None:
    options, z = ControlParameters(cluster_dropout=0.5, clusters=2, cluster_steps=10), torch.zeros(1, 16)
    first = without_dropped(z, options, 0, 0)
    assert torch.equal(first, without_dropped(z, options, 0, 9))
    later = {tuple(without_dropped(z, options, 0, step)[0].tolist()) for step in range(0, 100, 10)}
    assert len(later) > 7
    assert not torch.equal(first, without_dropped(z, options, 1, 0))
    counts = sum(without_dropped(z, options, 0, step).isfinite().float() for step in range(0, 4000, 10))
    assert torch.allclose(counts / 400, torch.full((1, 16), 0.5), atol=0.15)  # six standard deviations of 0.025


def test_tokens_choose_among_those_that_are_left_in_training_alone(stock: Any, ids: torch.Tensor) -> None:
    model = stock("mixtral")
    plain = chosen(model.eval(), ids)
    evaluated = chosen(model, ids, cluster_dropout=0.5, clusters=2)
    assert all(torch.equal(a.weights, b.weights) for a, b in zip(plain, evaluated, strict=True))
    options = ControlParameters(cluster_dropout=0.5, clusters=2)
    for before, found in zip(plain, chosen(model.train(), ids, cluster_dropout=0.5, clusters=2), strict=True):
        masked = without_dropped(found.logits.double(), options, before.layer, 0)
        weights, experts = found.rule.route(masked)
        assert before.layer > 0 or torch.equal(found.logits, before.logits)  # others read what others made
        assert torch.equal(experts.sort(1).values, found.experts.sort(1).values)
        torch.testing.assert_close(found.weights.double().sort(1).values, weights.sort(1).values, rtol=1e-5, atol=1e-6)
        assert len(found.experts.unique()) < len(before.experts.unique())
    later = chosen(model, ids, 250, cluster_dropout=0.5, clusters=2)
    first = chosen(model, ids, 0, cluster_dropout=0.5, clusters=2)
    assert any(not torch.equal(a.experts, b.experts) for a, b in zip(first, later, strict=True))


@pytest.mark.parametrize(
    ("target", "keys", "message"),
    [
        ("mixtral", {"clusters": 3}, "3 does not divide 4 experts"),
        ("mixtral", {"clusters": 1, "cluster_dropout": 0.8}, "0.8 leaves 1 of 4 experts, and each token needs 2"),
        ("deepseek_v3", {}, "choose by a bias"),
    ],
)
def test_what_cannot_be_is_refused(
    target: str, keys: dict[str, Any], message: str, stock: Any, ids: torch.Tensor
) -> None:
    with pytest.raises(UsageError, match=message):
        chosen(stock(target).train(), ids, **{"cluster_dropout": 0.5, **keys})
