"""Finds sets of experts that may go, by a bounded genetic search."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

    from upcycle.methods.compressing.layer_source import LayerSource

Chosen = tuple[int, ...]
T = TypeVar("T")


def ranked_experts(source: LayerSource, error: Callable[[list[int]], float]) -> list[int]:
    """Return a layer's experts, those first without which ``error``, of the experts that stay, is least.

    A search that numbers experts like that finds the same whatever their order in the file.
    """
    everyone = range(source.seen.experts)
    return sorted(everyone, key=lambda gone: (error([e for e in everyone if e != gone]), gone))


def best_sets(
    count: int,
    size: int,
    error: Callable[[Chosen], float],
    population: int,
    generations: int,
    wanted: int,
    rng: torch.Generator,
) -> list[Chosen]:
    """Return the best subsets found of ``range(count)``, best first, each ascending.

    All are tried where they are no more than a search would try. Else the population begins with the first ``size`` numbers and
    drawn sets; a child is drawn out of the union of two parents, and then, half of the time, one of its members is exchanged; the best
    of parents and children live on.

    Args:
        count: of how many.
        size: of the subsets.
        error: what is to be small; it is asked once per set.
        population: sets that live on.
        generations: how often children are made, as many as the population.
        wanted: how many are returned at most.
        rng: decides what is drawn.
    """
    import torch

    if math.comb(count, size) <= population * (generations + 1):
        found = {one: error(one) for one in itertools.combinations(range(count), size)}
        return _best(found, wanted)
    known: dict[Chosen, float] = {}

    def draw(members: Sequence[T], number: int) -> list[T]:
        return [members[i] for i in torch.randperm(len(members), generator=rng)[:number].tolist()]

    def add(one: Sequence[int]) -> None:
        chosen = tuple(sorted(one))
        if chosen not in known:
            known[chosen] = error(chosen)

    add(range(size))
    for _ in range(population - 1):
        add(draw(range(count), size))
    for _ in range(generations):
        parents = _best(known, population)
        for _ in range(population):
            one, other = (draw(parents, 2) * 2)[:2]
            child = draw(sorted({*one, *other}), size)
            if torch.rand((), generator=rng) < 0.5:
                child = child[1:] + draw([i for i in range(count) if i not in child], 1)
            add(child)
    return _best(known, wanted)


def _best(found: dict[Chosen, float], count: int) -> list[Chosen]:
    return sorted(found, key=lambda one: (found[one], one))[:count]


def evolved(
    first: Sequence[T],
    child: Callable[[T, T], T],
    error: Callable[[T], float],
    population: int,
    trials: int,
    rng: torch.Generator,
) -> T:
    """Return the individual of the least error that an evolution finds; of equals the first.

    Args:
        first: those that it begins with.
        child: makes one of two parents.
        error: what is to be small.
        population: how many of the best can be parents.
        trials: how often ``error`` is asked, the first included.
        rng: chooses parents.
    """
    import torch

    known: list[tuple[float, int, T]] = []
    for number in range(max(1, trials)):
        if number < len(first):
            one = first[number]
        else:
            places = torch.randint(min(population, len(known)), (2,), generator=rng).tolist()
            one = child(*(known[place][2] for place in places))
        known.append((error(one), number, one))
        known.sort(key=lambda each: each[:2])
    return known[0][2]
