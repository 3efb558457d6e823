"""The genetic search: exact where sets are few, bounded, seeded, and not worse than where it began."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from layer_sources import layer_source, random_observations

from upcycle.methods.compressing.dropping.moe_i2 import MoeI2, MoeI2Parameters
from upcycle.methods.compressing.dropping.naee import error_of
from upcycle.methods.compressing.set_search import best_sets, ranked_experts


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cost(one: tuple[int, ...]) -> float:
    """Pairs matter, not members alone."""
    return sum(((7 * a * b) % 11) for a, b in itertools.combinations(one, 2))


def test_few_sets_are_all_tried_once() -> None:
    asked: list[tuple[int, ...]] = []
    found = best_sets(6, 3, lambda one: [asked.append(one), cost(one)][1], 4, 4, 5, rng())  # type: ignore[func-returns-value]
    assert asked == [*itertools.combinations(range(6), 3)]
    assert found == sorted(asked, key=lambda one: (cost(one), one))[:5]


@pytest.mark.parametrize("seed", range(3))
def test_a_search_is_bounded_repeats_and_finds_better_sets_than_those_it_begins_with(seed: int) -> None:
    asked: list[tuple[int, ...]] = []

    def error(one: tuple[int, ...]) -> float:
        asked.append(one)
        return cost(one)

    found = best_sets(24, 6, error, 8, 20, 3, rng(seed))
    assert len(asked) == len(set(asked)) <= 8 * 21
    assert asked[0] == (0, 1, 2, 3, 4, 5)
    assert all(len(set(one)) == 6 and [*one] == sorted(one) for one in asked)
    assert found == sorted(asked, key=lambda one: (cost(one), one))[:3]
    assert cost(found[0]) < min(cost(one) for one in asked[:8])
    assert best_sets(24, 6, cost, 8, 20, 3, rng(seed)) == found
    assert best_sets(24, 6, cost, 8, 20, 3, rng(seed + 10)) != found or cost(found[0]) == 0


def test_the_order_of_experts_does_not_matter_to_a_search() -> None:
    seen = random_observations(10)
    order = [3, 9, 0, 5, 1, 7, 2, 8, 6, 4]
    changed = {
        name: getattr(seen, name)[..., order]
        for name in ("load", "weight", "score", "norm", "saliency", "bias", "sample_logits", "sample_weights")
    }
    changed["sample_gram"] = seen.sample_gram[:, order][:, :, order]
    other = type(seen)(**{**vars(seen), **changed})
    method = MoeI2(MoeI2Parameters(population=4, generations=5))
    one, two = (method.cut(layer_source(each), 5) for each in (seen, other))
    assert {order[expert] for expert in two.rows} == set(one.rows)
    source = layer_source(seen)
    ranks = ranked_experts(source, partial(error_of, source))
    errors = [error_of(source, [e for e in range(10) if e != gone]) for gone in ranks]
    assert errors == sorted(errors)


@pytest.mark.parametrize("seed", range(3))
def test_a_layer_alone_keeps_the_set_of_least_error(seed: int) -> None:
    source = layer_source(random_observations(6, seed))
    best = min(itertools.combinations(range(6), 3), key=lambda kept: error_of(source, list(kept)))
    assert MoeI2(MoeI2Parameters()).cut(source, 3).rows == best
