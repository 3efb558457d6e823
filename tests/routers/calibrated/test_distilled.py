"""Training against autograd, and what is kept of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, normalize

from upcycle.ffn.activations import Activations
from upcycle.ffn.blueprint import ZERO_NEURON
from upcycle.routers.calibrated import distilled
from upcycle.routers.calibrated.distilled import DistilledParameters, DistilledRouter


def mass_by_loops(planted: Any, hidden: torch.Tensor, by_norm: bool) -> torch.Tensor:
    norms = planted.ffn.down.norm(dim=0) if by_norm else torch.ones(24)
    real = [e.neurons[e.neurons != ZERO_NEURON] for e in planted.blueprint.routed]
    return torch.stack([(hidden.abs() * norms)[:, neurons].sum(1) for neurons in real], dim=1)


@pytest.mark.parametrize("by_norm", [True, False])
def test_one_epoch_is_what_autograd_does(planted: Any, by_norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    activations = Activations.of(planted.ffn, planted.tokens(64, 1))
    start = torch.randn(4, 24, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(distilled, "_start", lambda *_: start.double())
    shares = iter([0.0, 1.0])  # so that the epoch is kept
    monkeypatch.setattr(distilled, "_captured_mass", lambda *_: next(shares))
    router = DistilledRouter(DistilledParameters(epochs=1, learning_rate=0.1, by_norm=by_norm))
    with torch.no_grad():  # as conversions run
        found = router.directions(planted.blueprint, planted.ffn, torch.Generator().manual_seed(0), activations)

    (batch,) = activations.batches()
    mass = mass_by_loops(planted, batch.hidden, by_norm)
    rows = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([rows], lr=0.1)
    binary_cross_entropy_with_logits(normalize(batch.x) @ rows.T, mass / mass.max()).backward()
    optimizer.step()
    # The order of sums differs; Adam's first step is about 0.1 times the gradient's sign.
    torch.testing.assert_close(found, rows.detach(), rtol=0, atol=1e-4)


def test_the_best_epoch_is_kept(planted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def share(_: Any, __: Any, rows: torch.Tensor, ___: int) -> float:
        seen.append(rows.clone())
        return [0.5, 0.6, 0.9, 0.9, 0.7][len(seen) - 1]

    monkeypatch.setattr(distilled, "_captured_mass", share)
    router = DistilledRouter(DistilledParameters(epochs=4))
    found = router.directions(planted.blueprint, planted.ffn, torch.Generator(), planted.activations())
    assert len(seen) == 5
    assert torch.equal(found, seen[2])
    assert not torch.equal(found, seen[3])


def test_training_beats_its_start(planted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    start = torch.randn(4, 24, generator=torch.Generator().manual_seed(0)) * 0.01
    monkeypatch.setattr(distilled, "_start", lambda *_: start.double())
    activations = planted.activations()
    router = DistilledRouter(DistilledParameters(epochs=10, learning_rate=0.1))
    rows = router.directions(planted.blueprint, planted.ffn, torch.Generator().manual_seed(0), activations)
    spread = distilled.ExpertMap(planted.blueprint, planted.ffn)
    masses = [
        distilled._captured_mass(planted.activations(seed=7), spread.matrix(spread.norms), r, 1) for r in (start, rows)
    ]
    assert masses[0] < 0.6
    assert masses[1] > 0.95
