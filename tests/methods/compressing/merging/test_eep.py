"""EEP: its error is that of the merged experts really run, evolution keeps the best, and both phases do what the paper says."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from layer_sources import layer_source, random_matrices, random_observations

from upcycle.architectures.expert_terms import LayerCut
from upcycle.methods.compressing.dropping.naee import error_of
from upcycle.methods.compressing.layer_source import LayerSource
from upcycle.methods.compressing.merging.eep import Eep, EepParameters, Layer
from upcycle.methods.compressing.set_search import evolved


def consistent(experts: int, seed: int = 0, tokens: int = 40) -> LayerSource:
    """A layer whose observed products of outputs are those of its matrices on the sampled inputs."""
    seen, matrices = random_observations(experts, seed, tokens), random_matrices(5, 7, seed)
    outputs = torch.stack([run(matrices(e), seen.sample_inputs) for e in range(experts)], 1)
    return layer_source(replace(seen, sample_gram=outputs @ outputs.mT), matrices)


def run(matrices: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """In fp64."""
    own, x = {name: matrix.double() for name, matrix in matrices.items()}, x.double()
    return (torch.nn.functional.silu(x @ own["gate"].T) * (x @ own["up"].T)) @ own["down"].T


def measured(source: LayerSource, cut: LayerCut) -> float:
    """The error of the layer's output, token by token: a router over ``rows``, experts that are weighted sums."""
    seen, error, whole = source.seen, 0.0, 0.0
    experts = []
    for terms in cut.experts:
        parts = [{name: term.weight * m for name, m in source.matrices(term.expert).items()} for term in terms]
        experts.append({name: sum((part[name] for part in parts), torch.zeros(())) for name in parts[0]})
    for token in range(len(seen.sample_inputs)):
        x = seen.sample_inputs[token]
        target = sum(float(seen.sample_weights[token, e]) * run(source.matrices(e), x) for e in range(seen.experts))  # type: ignore[assignment]
        scores = seen.sample_logits[token, list(cut.rows)].softmax(0)
        weights, chosen = scores.topk(source.top_k)
        made = sum(float(w / weights.sum()) * run(experts[c], x) for w, c in zip(weights, chosen.tolist(), strict=True))
        error += float((target - made).square().sum())  # type: ignore[union-attr]
        whole += float(target.square().sum())  # type: ignore[attr-defined]
    return error / whole


def eep(**given: Any) -> Eep:
    return Eep(EepParameters(**given))


def test_errors_are_those_of_merged_experts_that_run() -> None:
    source = consistent(5)
    layer = Layer(source, [3, 0, 4, 1, 2], (1, 3, 4))
    for rows in (
        layer.alone,
        (((0, 0.3), (1, 0.8)), ((3, 1.0),), ((1, -0.2), (2, 0.1), (4, 1.1))),
    ):
        assert layer.error(rows) == pytest.approx(measured(source, layer.cut(rows)), rel=1e-5)
    assert layer.error(layer.alone) == pytest.approx(error_of(source, [0, 1, 2]), rel=1e-5)


@pytest.mark.parametrize("seed", range(2))
def test_pruning_finds_the_best_set_and_merging_is_no_worse(seed: int) -> None:
    source = consistent(6, seed)
    best = min(itertools.combinations(range(6), 3), key=lambda kept: error_of(source, list(kept)))
    pruned = eep(generations=0, population=20).cut(source, 3)
    assert pruned == LayerCut.keeping(best)
    cut = eep().cut(source, 3)
    assert cut.rows == best  # the mapping of the router stays
    assert cut.merges
    assert measured(source, cut) < error_of(source, list(best))
    assert eep().cut(source, 3) == cut
    other = layer_source(source.seen, source.matrices, seed=1)
    assert eep().cut(other, 3) != cut


def test_evolution_asks_so_often_and_keeps_the_best() -> None:
    rng, asked = torch.Generator().manual_seed(0), []

    def child(one: float, other: float) -> float:
        return (one + other) / 2 + float(torch.randn((), generator=rng))

    def error(one: float) -> float:
        asked.append(one)
        return abs(one - 7)

    found = evolved([0.0, 1.0], child, error, 4, 60, rng)
    assert asked[:2] == [0.0, 1.0]
    assert len(asked) == 60
    assert found == min(asked, key=lambda one: abs(one - 7))
    assert abs(found - 7) < 1
    assert evolved([3.0], child, error, 4, 1, rng) == 3.0


class Losses:
    """Pretends that the whole model is best when layer 0 keeps experts 1 and 3, and its first expert mixes in some of expert 0."""

    def __init__(self) -> None:
        self.asked: list[dict[int, LayerCut]] = []

    def loss(self, cuts: Any) -> float:
        self.asked.append(cuts)
        (cut,) = cuts.values()
        mixed = sum(term.weight for term in cut.experts[0] if term.expert == 0)
        return float(cut.rows != (1, 3)) + abs(mixed - 0.2)


def test_loss_decides_over_all_layers_where_it_is_asked_for() -> None:
    source, trial = consistent(4), Losses()
    method = eep(fitness="loss", trials=80)
    assert method.tries
    assert not eep().tries
    whole: Any = SimpleNamespace(model=SimpleNamespace(experts=4), layers={0: source}, seed=0, trial=trial)
    found = method.cuts(whole, 2)
    assert found[0].rows == (1, 3)  # type: ignore[union-attr]
    assert len(trial.asked) == 160
    assert all(not cuts[0].merges for cuts in trial.asked[:80])
    assert trial.loss(found) == min(map(trial.loss, trial.asked[:]))
    assert trial.loss(found) < 0.15
