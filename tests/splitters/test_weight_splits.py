"""The splits that look at weights alone: weight_kmeans, d2d, factor."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ffn_forms import FORMS, ffn_of
from pydantic import ValidationError

from upcycle.calibration.decide_layer import generator
from upcycle.errors import UsageError
from upcycle.ffn.feed_forward import FeedForward
from upcycle.ffn.moe_shape import MoeShape
from upcycle.methods.base import Partition
from upcycle.plugins import PluginParameters
from upcycle.splitters import d2d, weight_kmeans
from upcycle.splitters.contiguous_split import ContiguousSplit
from upcycle.splitters.d2d import D2D
from upcycle.splitters.factor import Factor
from upcycle.splitters.weight_kmeans import WeightKMeans, WeightKMeansParameters

D, F, E = 12, 64, 4


def layer(gate: torch.Tensor | None = None, up: torch.Tensor | None = None) -> FeedForward:
    rng = torch.Generator().manual_seed(1)
    drawn = [torch.randn(shape, generator=rng) for shape in ((F, D), (F, D), (D, F))]
    return FeedForward(
        0, drawn[0] if gate is None else gate, drawn[1] if up is None else up, drawn[2], torch.ones(D), "silu"
    )


def planted() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows ``[F, D]`` around E directions, of lengths that differ a thousandfold, and which direction is whose."""
    rng = torch.Generator().manual_seed(2)
    truth = torch.randperm(F, generator=rng) % E
    rows = torch.eye(D)[truth] + 0.05 * torch.randn(F, D, generator=rng)
    return rows * 10 ** (3 * torch.rand(F, 1, generator=rng)), truth


def same_groups(labels: torch.Tensor, truth: torch.Tensor) -> bool:
    return bool(((labels[:, None] == labels) == (truth[:, None] == truth)).all())


def split(method: Partition, ffn: FeedForward) -> torch.Tensor:
    return method.labels(torch.arange(F), E, ffn, generator(0, 0, "method"), None)


@pytest.mark.parametrize("matrix", ["up", "gate", "both"])
def test_rows_of_the_wanted_matrix_are_clustered_at_length_one(monkeypatch: pytest.MonkeyPatch, matrix: Any) -> None:
    seen: dict[str, Any] = {}

    def fake(points: torch.Tensor, clusters: int, *, seed: int, n_init: int = 1) -> torch.Tensor:
        seen.update(points=points, clusters=clusters, seed=seed, n_init=n_init)
        return torch.arange(len(points)) % clusters

    monkeypatch.setattr(weight_kmeans, "balanced_kmeans", fake)
    ffn, neurons = layer(), torch.arange(5, F)
    method = WeightKMeans(WeightKMeansParameters(matrix=matrix, n_init=3))
    method.labels(neurons, E, ffn, generator(0, 0, "method"), None)
    wanted = {"up": [ffn.up], "gate": [ffn.gate], "both": [ffn.gate, ffn.up]}[matrix]
    rows = [m.double().numpy()[5:] for m in wanted]
    expected = np.concatenate([r / np.sqrt((r * r).sum(1, keepdims=True)) for r in rows], axis=1)
    assert np.abs(seen["points"].numpy() - expected).max() < 1e-6
    assert (seen["clusters"], seen["n_init"]) == (E, 3)
    method.labels(neurons, E, ffn, generator(1, 0, "method"), None)
    assert seen["seed"] not in (0, int(torch.randint(2**31 - 1, (1,), generator=generator(0, 0, "method"))))


@pytest.mark.parametrize("matrix", ["up", "gate", "both"])
def test_planted_clusters_are_found(matrix: Any) -> None:
    rows, truth = planted()
    ffn = layer(gate=rows if matrix != "up" else None, up=rows if matrix != "gate" else None)
    method = WeightKMeans(WeightKMeansParameters(matrix=matrix, n_init=4))
    assert same_groups(split(method, ffn), truth)


def test_d2d_clusters_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, torch.Tensor] = {}

    def fake(points: torch.Tensor, clusters: int, *, seed: int) -> torch.Tensor:
        seen["points"] = points
        return torch.arange(len(points)) % clusters

    monkeypatch.setattr(d2d, "balanced_kmeans", fake)
    ffn = layer()
    split(D2D(D2D.Parameters()), ffn)
    gate = ffn.gate.double().numpy()
    assert np.abs(seen["points"].numpy() - gate / np.linalg.norm(gate, axis=1, keepdims=True)).max() < 1e-6


@pytest.mark.parametrize("method", [WeightKMeans(WeightKMeansParameters(matrix="both")), D2D(D2D.Parameters())])
def test_equal_weights_are_no_reason_to_stop(method: Partition) -> None:
    for value in (0.0, 1.0):
        same = torch.full((F, D), value)
        assert torch.bincount(split(method, layer(same, same))).tolist() == [F // E] * E


def test_factor_is_the_contiguous_split_at_full_strength() -> None:
    factor, plain, shape = (
        Factor(Factor.Parameters()),
        ContiguousSplit(Factor.Parameters()),
        MoeShape(3, 1, 1, 16, (0,)),
    )
    rng = generator(0, 0, "method")
    ours, theirs = (method.blueprint(layer(), shape, 1.0, rng) for method in (factor, plain))
    for a, b in zip(ours.routed + ours.shared, theirs.routed + theirs.shared, strict=True):
        assert torch.equal(a.neurons, b.neurons)
    # y = (E/k) * sum of k experts, each of router weight 1/k: the factor on the down projection is E.
    assert [factor.scale(convention, 8, 2) for convention in ("exact", "sum", "paper")] == [8, 2, 8]


def test_scales_of_the_papers() -> None:
    assert WeightKMeans(WeightKMeansParameters()).scale("paper", 8, 2) == 4
    assert [D2D(D2D.Parameters()).scale(convention, 8, 2) for convention in ("exact", "sum", "paper")] == [8, 2, 2]


def test_unknown_matrix() -> None:
    with pytest.raises(ValidationError):
        WeightKMeansParameters.model_validate({"matrix": "down"})


@pytest.mark.parametrize("matrix", ["gate", "both"])
def test_a_gate_that_is_not_there_cannot_be_clustered(matrix: str) -> None:
    method = WeightKMeans(WeightKMeansParameters(matrix=matrix))
    dense = ffn_of(FORMS["ungated, biases"], 48, 16)
    shape = MoeShape(3, 1, 0, 16, (3,), form=dense.form)
    for refused in (lambda: method.check(shape), lambda: method.blueprint(dense, shape, 1.0, torch.Generator())):
        with pytest.raises(UsageError, match=f"rows of gate .matrix={matrix}") as caught:
            refused()
        assert caught.value.hint == "--param matrix=up"


def test_without_a_gate_the_activated_rows_are_those_of_up() -> None:
    dense, neurons = ffn_of(FORMS["ungated, biases"], 48, 16), torch.arange(48)
    labels = [
        method.labels(neurons, 3, dense, torch.Generator().manual_seed(1), None)
        for method in (D2D(PluginParameters()), WeightKMeans(WeightKMeansParameters(matrix="up")))
    ]
    assert torch.equal(*labels)
