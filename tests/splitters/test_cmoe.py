"""CMoE's marks and rates against its formula, and what is asked of the marker assignment."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from upcycle.calibration.decide_layer import generator
from upcycle.ffn.activations import Activations
from upcycle.ffn.feed_forward import FeedForward
from upcycle.ffn.moe_shape import MoeShape
from upcycle.splitters import cmoe
from upcycle.splitters.cmoe import CMoE, CMoEParameters, markers

D, F, E, T, K = 8, 40, 3, 120, 6


def layer(scale: torch.Tensor | float = 1.0) -> FeedForward:
    rng = torch.Generator().manual_seed(1)
    gate, up, down = (torch.randn(shape, generator=rng) for shape in ((F, D), (F, D), (D, F)))
    return FeedForward(0, gate * scale, up, down, torch.ones(D), "silu")


def tokens() -> torch.Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(2)) + 0.5


def strengths(ffn: FeedForward, x: torch.Tensor) -> np.ndarray:
    """``|silu(norm(x) norm(Wg)^T) * (norm(x) norm(Wu)^T)|`` in fp64."""
    unit = [m / np.linalg.norm(m, axis=1, keepdims=True) for m in (t.double().numpy() for t in (x, ffn.gate, ffn.up))]
    gate = unit[0] @ unit[1].T
    return np.abs(gate / (1 + np.exp(-gate)) * (unit[0] @ unit[2].T))


def test_marks_are_the_strongest_neurons_of_every_token() -> None:
    ffn, x = layer(), tokens()
    found = markers(Activations.of(ffn, x, batch=50), K)
    assert (found.shape, found.dtype) == ((T, K), torch.int32)
    order = np.argsort(-strengths(ffn, x), axis=1)[:, :K]
    assert np.array_equal(np.sort(found.numpy(), axis=1), np.sort(order, axis=1))


def test_lengths_of_tokens_and_rows_decide_nothing() -> None:
    longer = torch.arange(1, F + 1)[:, None] / 7
    first = markers(Activations.of(layer(), tokens()), K).sort().values
    second = markers(Activations.of(layer(longer), tokens() * torch.arange(1, T + 1)[:, None]), K).sort().values
    assert torch.equal(first, second)


def test_a_token_has_no_more_marks_than_neurons() -> None:
    assert markers(Activations.of(layer(), tokens()), 4096).shape == (T, F)


def test_shared_neurons_have_the_highest_rates_and_the_rest_is_clustered(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    real = cmoe.marker_assignment

    def spy(marks: torch.Tensor, neurons: torch.Tensor, experts: int, **keys: Any) -> Any:
        asked.append({"marks": marks, "neurons": neurons, "experts": experts, **keys})
        return real(marks, neurons, experts, **keys)

    monkeypatch.setattr(cmoe, "marker_assignment", spy)
    ffn, x = layer(), tokens()
    activations = Activations.of(ffn, x)
    passes = []
    monkeypatch.setattr(cmoe, "markers", lambda given, count: passes.append(count) or markers(given, count))
    method = CMoE(CMoEParameters(k_act=K, iterations=2))
    made = method.blueprint(ffn, MoeShape(E, 1, 1, 10, (0,)), 1.0, generator(0, 0, "method"), activations)

    order = np.argsort(-strengths(ffn, x), axis=1)[:, :K]
    rates = np.bincount(order.ravel(), minlength=F) / T
    shared = sorted(np.argsort(-rates, kind="stable")[:10].tolist())
    assert made.shared[0].neurons.tolist() == shared
    (call,) = asked
    assert call["neurons"].tolist() == [j for j in range(F) if j not in shared]
    assert (call["experts"], call["intermediate_size"], call["iterations"]) == (E, F, 2)
    assert torch.equal(call["marks"], markers(activations, K))
    assert passes == [K]  # one pass over the text for both


def test_the_next_layer_has_marks_of_its_own() -> None:
    method, shape = CMoE(CMoEParameters(k_act=K)), MoeShape(E, 1, 1, 10, (0,))
    first, other = layer(), layer()
    other = FeedForward(1, other.up, other.gate.flip(0), other.down, other.norm, "silu")
    made = [
        method.blueprint(ffn, shape, 1.0, generator(0, 0, "method"), Activations.of(ffn, tokens()))
        for ffn in (first, other)
    ]
    assert not torch.equal(made[0].shared[0].neurons, made[1].shared[0].neurons)


def test_weights_of_zero_are_no_reason_to_stop() -> None:
    zero = FeedForward(0, torch.zeros(F, D), torch.zeros(F, D), torch.zeros(D, F), torch.ones(D), "silu")
    made = CMoE(CMoEParameters()).blueprint(
        zero, MoeShape(E, 1, 1, 10, (0,)), 1.0, generator(0, 0, "method"), Activations.of(zero, tokens())
    )
    assert torch.equal(made.neurons.sort().values, torch.arange(F))


def test_the_paper_adds_experts_up() -> None:
    assert [CMoE(CMoEParameters()).scale(convention, 8, 2) for convention in ("exact", "sum", "paper")] == [8, 2, 2]
