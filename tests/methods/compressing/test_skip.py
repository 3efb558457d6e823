"""Thresholds of dynamic skipping, restated token by token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from layer_sources import layer_source, random_observations

import upcycle
from upcycle.errors import UsageError
from upcycle.methods.compressing.skip import Skip, SkipParameters, threshold
from upcycle.models.own.routing.skip import SkipRule

Models = Callable[..., Path]


@pytest.mark.parametrize("top_k", [2, 3])
@pytest.mark.parametrize("share", [0.5, 0.66, 0.75, 0.9, 1.0])
def test_the_threshold_keeps_the_share_of_the_sampled_tokens(top_k: int, share: float) -> None:
    seen = random_observations(6, tokens=200, top_k=top_k)
    beta = threshold(seen.sample_weights, top_k, share)
    runs = [sum(w > 0 and w >= beta * max(row) for w in row) for row in seen.sample_weights.tolist()]
    least = 1 / top_k  # the first always runs
    assert abs(sum(runs) / 200 / top_k - max(share, least)) < 1 / 200
    rule = SkipRule(top_k, beta=beta)
    kept = (rule.route(seen.sample_logits).experts < 6).sum(1)
    assert kept.tolist() == runs


def test_three_quarters_of_two_is_the_papers_median() -> None:
    weights = random_observations(6, tokens=201).sample_weights
    two = weights.topk(2, dim=1).values
    ratios = sorted((two[:, 1] / two[:, 0]).tolist())
    assert ratios[99] < threshold(weights, 2, 0.75) <= ratios[101]


def test_a_cut_has_the_layers_threshold() -> None:
    seen = random_observations(4)
    cut = Skip(SkipParameters()).cut(layer_source(seen), 1500)
    assert cut.skip == threshold(seen.sample_weights, 2, 0.75) > 0
    assert cut.rows == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("keys", "message", "hint"),
    [
        ({}, "skip needs to know which share", "--keep 0.75"),
        ({"keep": 0.4}, "keep 0.4 of 2 expert runs per token leaves 0.8", "--keep 0.5 or more"),
        (
            {"keep": 0.75},
            "the routers of a 'mixtral' model run as many experts for every token",
            "--target upcycle_moe",
        ),
    ],
)
def test_what_cannot_be_is_refused(keys: dict[str, float], message: str, hint: str, pico_moe: Models) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        upcycle.plan(str(pico_moe("mixtral")), method="skip", calibration={"text": "demo"}, **keys)
    assert hint in (caught.value.hint or "")
