"""REAM against its paper in plain loops: who stays, who joins whom, in which order of neurons and with which weights."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from layer_sources import layer_source, random_matrices, random_observations

from upcycle.architectures.expert_terms import LayerCut
from upcycle.checkpoints.moe_checkpoint import reordered
from upcycle.methods.compressing.layer_source import LayerSource
from upcycle.methods.compressing.merging.ream import Ream, ReamParameters, likeness


def ream(group_size: int = 16) -> Ream:
    return Ream(ReamParameters(group_size=group_size))


def saliencies(source: LayerSource) -> list[float]:
    seen, found = source.seen, []
    for expert in range(seen.experts):
        own = seen.sample_weights[:, expert]
        norms = seen.sample_gram[:, expert, expert].sqrt()
        found.append(float((own * norms)[own > 0].mean()) if bool((own > 0).any()) else 0.0)
    least = min(0.5, *(one for one in found if one > 0))
    return [one or least for one in found]


def alike(source: LayerSource) -> np.ndarray:
    """Likeness of every two experts, pair by pair, from router logits themselves."""
    seen = source.seen
    count = seen.experts
    logits = [seen.sample_logits[:, e] / seen.sample_logits[:, e].norm() for e in range(count)]
    apart = np.array([[float((a - b).norm()) for b in logits] for a in logits])
    found = np.zeros((count, count))
    for i, j in itertools.product(range(count), repeat=2):
        cosine = float(torch.cosine_similarity(seen.gated_output[i], seen.gated_output[j], dim=0))
        found[i, j] = ((1 + cosine) / 2 + 1 - apart[i, j] / apart.max()) / 2
    return found


def grouped(source: LayerSource, keep: int, most: int) -> set[frozenset[int]]:
    scores, close = saliencies(source), alike(source)
    order = sorted(range(len(scores)), key=lambda e: (-scores[e], e))
    groups, free = [[e] for e in order[:keep]], order[keep:]
    for group in groups:
        while free and len(group) < most:
            group.append(free.pop(free.index(max(free, key=lambda e: close[group[0], e]))))
    return {frozenset(group) for group in groups}


def groups_of(cut: LayerCut) -> set[frozenset[int]]:
    return {frozenset(term.expert for term in terms) for terms in cut.experts}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("keep", "most"), [(4, 16), (4, 2), (3, 3), (5, 2)])
def test_the_most_salient_stay_and_take_those_most_like_them(keep: int, most: int, seed: int) -> None:
    source = layer_source(random_observations(7, seed))
    np.testing.assert_allclose(likeness(source).numpy(), alike(source), atol=1e-7)  # a root of cancelled fp64 sums
    cut, scores = ream(most).cut(source, keep), saliencies(source)
    assert groups_of(cut) == grouped(source, keep, most)
    assert set(cut.rows) == set(sorted(range(7), key=lambda e: (-scores[e], e))[:keep])
    for terms, row in zip(cut.experts, cut.rows, strict=True):
        total = sum(scores[term.expert] for term in terms)
        assert [term.weight for term in terms] == pytest.approx([scores[term.expert] / total for term in terms])
        assert row in {term.expert for term in terms}
        assert all(term.order is None for term in terms if term.expert == row)


def cost(source: LayerSource, one: int, other: int, order: tuple[int, ...]) -> float:
    def described(expert: int) -> list[torch.Tensor]:
        own, x = source.matrices(expert), source.seen.sample_inputs
        active = torch.nn.functional.silu(x @ own["gate"].T) * (x @ own["up"].T)
        return [active.T.double(), torch.cat([own["gate"], own["up"], own["down"].T], 1).double()]

    total = 0.0
    for mine, theirs in zip(described(one), described(other), strict=True):
        for i, j in enumerate(order):
            total += float((mine[i] / mine[i].norm() - theirs[j] / theirs[j].norm()).norm())
    return total


@pytest.mark.parametrize("seed", range(2))
def test_neurons_are_matched_by_activations_and_weights(seed: int) -> None:
    source = layer_source(random_observations(3, seed), random_matrices(4, 7, seed))
    cut = ream().cut(source, 1)
    (terms,), (first,) = cut.experts, cut.rows
    for term in terms:
        if term.expert != first:
            best = min(itertools.permutations(range(4)), key=lambda order: cost(source, first, term.expert, order))
            assert term.order == best


def test_permuted_copies_of_one_expert_merge_to_itself() -> None:
    whole = random_matrices(6, 7)(0)
    orders = [torch.arange(6), torch.tensor([3, 0, 5, 1, 4, 2]), torch.tensor([5, 4, 3, 2, 1, 0])]

    def matrices(expert: int) -> dict[str, torch.Tensor]:
        return {part: reordered(matrix, part, orders[expert]) for part, matrix in whole.items()}

    cut = ream().cut(layer_source(random_observations(3), matrices), 1)
    (terms,), (first,) = cut.experts, cut.rows
    for part in whole:
        made = torch.zeros_like(whole[part])
        for term in terms:
            matrix = matrices(term.expert)[part]
            made += term.weight * (matrix if term.order is None else reordered(matrix, part, torch.tensor(term.order)))
        assert torch.allclose(made, matrices(first)[part], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("unused", [[1], [0, 1, 2, 3]])
def test_experts_that_no_token_chose_are_merged_and_nothing_is_nan(unused: list[int]) -> None:
    seen = random_observations(4)
    load, saliency = seen.load.clone(), seen.saliency.clone()
    load[unused] = saliency[unused] = 0
    cut = ream().cut(layer_source(replace(seen, load=load, saliency=saliency)), 2)
    assert frozenset().union(*groups_of(cut)) == frozenset(range(4))
    for terms in cut.experts:
        assert sum(term.weight for term in terms) == pytest.approx(1)
