"""The allocation of bits, against every allocation there is."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from upcycle.errors import UsageError
from upcycle.precision.allocation import (
    LayerImportance,
    by_expert,
    by_layer,
    by_rules,
    evenly,
    mc_moe_costs,
    programme,
    widths_of,
)


def layer(seed: int, experts: int = 4) -> LayerImportance:
    draw = torch.Generator().manual_seed(seed)
    load = torch.rand(experts, generator=draw).double()
    error = torch.rand(experts, 1, generator=draw).double() * torch.tensor([[1.0, 0.4, 0.1]]).double()
    return LayerImportance(load / load.sum(), torch.rand(experts, generator=draw).double(), error, load.flip(0))


LAYERS = [layer(seed) for seed in range(3)]


@pytest.mark.parametrize("mean", [2.0, 2.25, 2.5, 3.1, 4.0])
def test_the_programme_finds_the_least_of_all_allocations(mean: float) -> None:
    costs, sizes, widths = LAYERS[0].error, [1, 2, 1, 3], (2, 3, 4)
    found = programme(costs, sizes, widths, mean)

    def cost(chosen: tuple[int, ...]) -> float:
        return sum(float(costs[unit, bits - 2]) for unit, bits in enumerate(chosen))

    fits = [c for c in product(widths, repeat=4) if sum(b * s for b, s in zip(c, sizes, strict=True)) <= mean * 7]
    assert tuple(found) in fits
    assert cost(tuple(found)) == pytest.approx(min(map(cost, fits)))


def test_no_width_is_small_enough() -> None:
    with pytest.raises(UsageError, match=r"no mean of 1\.5 bits"):
        programme(LAYERS[0].error, [1] * 4, (2, 3, 4), 1.5)


def test_mc_moe_weighs_errors_by_load_and_weight() -> None:
    (costs,) = mc_moe_costs(LAYERS[:1])
    one = LAYERS[0]
    for expert, place in product(range(4), range(3)):
        expected = one.load[expert] ** 1.0 * one.weight[expert] ** 1.5 * one.error[expert, place] ** 2.0
        assert float(costs[expert, place]) == pytest.approx(float(expected))
    chosen = by_expert(LAYERS, (2, 3, 4), 2.5)
    assert all(sum(own) <= 10 for own in chosen)
    assert any(len(set(own)) > 1 for own in chosen)


def test_layers_get_one_width_each_and_the_worst_the_most() -> None:
    chosen = by_layer(LAYERS, (2, 3, 4), 3.0)
    assert all(len(set(own)) == 1 for own in chosen)
    assert sum(own[0] for own in chosen) <= 9
    weak = LayerImportance(LAYERS[0].load, LAYERS[0].weight, LAYERS[0].error * 100, LAYERS[0].outliers)
    assert by_layer([LAYERS[1], weak], (2, 3, 4), 2.5) == [[2] * 4, [3] * 4]


def test_rules() -> None:
    assert by_rules(LAYERS, (2, 3, 4), 2.5, "first") == [[3] * 4, [2] * 4, [2] * 4]
    for by in ("frequency", "outliers"):
        for own, one in zip(by_rules(LAYERS, (2, 3, 4), 2.5, by), LAYERS, strict=True):
            scores = one.load if by == "frequency" else one.outliers
            assert sorted(own) == [2, 2, 3, 3]
            assert {e for e, bits in enumerate(own) if bits == 3} == set(scores.topk(2).indices.tolist())


def test_even_allocation_and_widths() -> None:
    assert [own[0] for own in evenly(6, 2, 2.5)] == [2, 3, 2, 3, 2, 3]
    assert [own[0] for own in evenly(4, 2, 2.25)] == [2, 2, 2, 3]
    assert widths_of(2.5) == (2, 3, 4)
    assert widths_of(4.0) == (3, 4, 5)
    assert widths_of(7.5) == (6, 7, 8)
