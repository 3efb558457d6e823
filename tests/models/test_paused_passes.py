"""Passes that pause at layers give what plain passes of stock models give, to the bit, and end when they are told to."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from wrapped_models import SMALL, inputs_of, output_of, small_model

import upcycle.models  # noqa: F401
from upcycle.architectures.module_paths import module_paths_in
from upcycle.models.paused_passes import PausedPasses
from upcycle.registry import load

pytestmark = pytest.mark.one_in(24)  # the other cases are long

PAUSES = [name for name, (described, _, _) in SMALL.items() if load("described", described).pauses]


def paused(name: str) -> tuple[Any, PausedPasses, int]:
    model = small_model(name)
    model.config.architectures = [type(model).__name__]
    layers = module_paths_in(model).layers_in(model)
    return model, PausedPasses(model, layers), len(layers)


@pytest.mark.parametrize("name", PAUSES)
def test_every_layer_pauses_once_and_the_outcome_is_the_plain_one(name: str) -> None:
    model, passes, layers = paused(name)
    inputs = inputs_of(name)
    expected, plain, made = output_of(model, inputs), model.forward, list[Any]()
    model.forward = lambda **given: made.append(plain(**given))
    order = []
    with torch.no_grad(), passes.over([inputs, inputs]) as running:
        while running[0].call is not None:
            order.append(running[0].call.layer)
            assert running[1].call is not None
            assert running[1].call.layer == order[-1]
            for one in running:
                assert one.call is not None
                one.resume(passes.run(one.call))
    assert sorted(order) == list(range(layers))
    found = [output_of(lambda outcome=outcome: outcome, {}) for outcome in made]
    assert len(found) == 2
    assert all(torch.equal(one, expected) for one in found)
    del model.forward
    assert torch.equal(output_of(model, inputs), expected)  # layers run as before


def test_passes_that_are_left_end_and_errors_of_the_model_arrive() -> None:
    model, passes, _ = paused("bart")
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="in the middle"), passes.over([inputs_of("bart")] * 3) as running:
        assert threading.active_count() == before + 3
        assert [one.call.layer for one in running if one.call] == [0, 0, 0]
        raise RuntimeError("in the middle")
    assert threading.active_count() == before
    with pytest.raises(IndexError), passes.over([{"input_ids": torch.tensor([[10_000]])}]):
        pass
    assert threading.active_count() == before
    assert output_of(model, inputs_of("bart")).isfinite().all()
