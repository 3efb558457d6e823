"""Frequency, REAP and random experts: the formulas of their papers in plain loops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from layer_sources import layer_source, random_observations

from upcycle.methods.compressing.base import best
from upcycle.methods.compressing.dropping.frequency import Frequency, FrequencyParameters
from upcycle.methods.compressing.dropping.random_experts import RandomExperts
from upcycle.methods.compressing.dropping.reap import Reap
from upcycle.plugins import PluginParameters


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", ["soft", "hard"])
def test_frequency_keeps_the_largest_counts(count: Any, seed: int) -> None:
    seen = random_observations(6, seed)
    counts = [0.0] * 6
    for logits in seen.sample_logits:
        scores = logits.softmax(-1)
        chosen = scores.topk(2).indices.tolist()
        for expert in range(6):
            counts[expert] += float(scores[expert]) if count == "soft" else float(expert in chosen)
    kept = sorted(sorted(range(6), key=lambda e: (-counts[e], e))[:3])
    assert Frequency(FrequencyParameters(count=count)).cut(layer_source(seen), 3).rows == tuple(kept)


def test_soft_and_hard_counts_are_told_apart() -> None:
    seen = replace(random_observations(3), load=torch.tensor([3.0, 2.0, 1.0]), score=torch.tensor([1.0, 2.0, 3.0]))
    assert Frequency(FrequencyParameters(count="hard")).cut(layer_source(seen), 1).rows == (0,)
    assert Frequency(FrequencyParameters()).cut(layer_source(seen), 1).rows == (2,)


@pytest.mark.parametrize("seed", range(4))
def test_reap_keeps_the_largest_mean_of_weighted_norms(seed: int) -> None:
    seen = random_observations(6, seed)
    norms = seen.sample_gram.diagonal(dim1=1, dim2=2).sqrt()
    scores = []
    for expert in range(6):
        chosen = seen.sample_weights[:, expert] > 0
        scores.append(float((seen.sample_weights[:, expert] * norms[:, expert])[chosen].mean()))
    kept = sorted(sorted(range(6), key=lambda e: -scores[e])[:3])
    assert Reap(PluginParameters()).cut(layer_source(seen), 3).rows == tuple(kept)


def test_an_expert_that_no_token_chose_scores_nothing_and_not_nan() -> None:
    seen = random_observations(4)
    load, saliency = seen.load.clone(), seen.saliency.clone()
    load[1] = saliency[1] = 0
    assert Reap(PluginParameters()).cut(layer_source(replace(seen, load=load, saliency=saliency)), 3).rows == (0, 2, 3)


@pytest.mark.parametrize(("scores", "kept"), [([1, 1, 1, 1], (0, 1)), ([0, 2, 2, 2], (1, 2)), ([3, 0, 1, 3], (0, 3))])
def test_of_equals_the_first_stay(scores: list[float], kept: tuple[int, ...]) -> None:
    assert best(scores, 2).rows == kept


def test_random_experts_differ_by_layer_and_seed_and_repeat() -> None:
    seen = random_observations(16)

    def drawn(**changes: Any) -> tuple[int, ...]:
        return RandomExperts(PluginParameters()).cut(replace(layer_source(seen), **changes), 8).rows

    assert drawn() == drawn()
    assert len({drawn(layer=layer, seed=seed) for layer in (0, 1) for seed in (0, 1)}) == 4
    assert drawn() == tuple(sorted(set(drawn())))
