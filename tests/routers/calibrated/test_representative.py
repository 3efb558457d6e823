"""Representatives against the paper's matrix of marks."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch.nn.functional import silu

from upcycle.ffn.activations import Activations
from upcycle.ffn.blueprint import ZERO_NEURON, ExpertSpec, LayerBlueprint
from upcycle.ffn.feed_forward import FeedForward
from upcycle.routers.calibrated.representative import representatives


@pytest.mark.one_in(3)
@pytest.mark.parametrize("nearest", ["l1", "cosine"])
@pytest.mark.parametrize("k_act", [1, 5])
def test_representatives(nearest: Literal["l1", "cosine"], k_act: int) -> None:
    rng = torch.Generator().manual_seed(0)
    d, f = 12, 30
    gate, up, down = (torch.randn(shape, generator=rng) for shape in ((f, d), (f, d), (d, f)))
    ffn = FeedForward(0, gate, up, down, torch.ones(d), "silu")
    order = torch.randperm(f, generator=rng).tolist()
    # The last expert shares neurons with the first and ends in zero neurons.
    experts = [order[:10], order[10:20], order[20:], [*order[:4], order[15], *[ZERO_NEURON] * 5]]
    blueprint = LayerBlueprint(0, tuple(ExpertSpec(torch.tensor(e)) for e in experts), 2, 1.0)
    x = torch.randn(160, d, generator=rng)
    marks = torch.zeros(160, f, dtype=torch.float64)
    for t in range(160):
        unit = x[t].double() / x[t].double().norm()
        h = [
            (silu(g.double() @ unit / g.double().norm()) * (u.double() @ unit / u.double().norm())).abs().item()
            for g, u in zip(gate, up, strict=True)
        ]
        for j in sorted(range(f), key=lambda j: -h[j])[:k_act]:
            marks[t, j] = 1
    seen = marks[torch.arange(160) // 10 % 8 != 7]
    found = representatives(Activations.of(ffn, x, batch=10), blueprint, k_act, nearest)
    for e, neurons in enumerate(experts):
        real = [j for j in neurons if j != ZERO_NEURON]
        mean = seen[:, real].mean(dim=1)
        if nearest == "l1":
            far = [(seen[:, j] - mean).abs().sum().item() for j in real]
        else:
            far = [-(seen[:, j] @ mean / seen[:, j].norm().clamp(min=1e-9)).item() for j in real]
        assert int(found[e]) in real
        assert far[real.index(int(found[e]))] == pytest.approx(min(far), rel=1e-12)


def test_more_marks_than_neurons(planted: Any) -> None:
    found = representatives(planted.activations(), planted.blueprint, 1000, "l1")
    assert len(set(found.tolist())) == 4
