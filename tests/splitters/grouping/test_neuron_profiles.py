"""Streamed co-activation and profiles against their definitions in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from upcycle.ffn.activations import Activations, Inputs, TokenActivations
from upcycle.ffn.feed_forward import FeedForward
from upcycle.splitters.grouping.neuron_profiles import coactivation, principal_profiles, sketched_profiles

D, F, T = 6, 24, 50
NEURONS = torch.tensor([0, 2, 3, 7, 8, 11, 15, 16, 20, 23])


def layer() -> FeedForward:
    rng = torch.Generator().manual_seed(1)
    gate, up, down = (torch.randn(shape, generator=rng) for shape in ((F, D), (F, D), (D, F)))
    return FeedForward(0, gate, up, down, torch.ones(D), "silu")


def weighted(tokens: int = T, batch: int = 20) -> Activations:
    rng = torch.Generator().manual_seed(2)
    x, weight = torch.randn(tokens, D, generator=rng), torch.rand(tokens, generator=rng) + 0.5
    return Activations(
        layer(), lambda: (Inputs(a, b, False) for a, b in zip(x.split(batch), weight.split(batch), strict=True)), tokens
    )


def everything(activations: Activations) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    batches: list[TokenActivations] = list(activations.batches())
    hidden = torch.cat([batch.hidden for batch in batches]).double().abs().numpy()
    return hidden, torch.cat([batch.weight for batch in batches]).double().numpy()


@pytest.mark.parametrize("threshold", [0.0, 0.8])
@pytest.mark.parametrize("clip_tokens", [0, 8])
def test_coactivation(threshold: float, clip_tokens: int) -> None:
    hidden, weight = everything(weighted())
    expected = np.zeros((len(NEURONS), len(NEURONS)))
    for start in range(0, T, 20):  # groups end with a batch
        tokens = range(start, min(start + 20, T))
        step = clip_tokens or len(tokens)
        for first in range(0, len(tokens), step):
            part = np.zeros_like(expected)
            for t in tokens[first : first + step]:
                active = hidden[t] > threshold * np.sqrt((hidden[t] ** 2).mean())
                row = np.where(active, hidden[t], 0)[NEURONS.numpy()]
                part += weight[t] * np.outer(row, row)
            expected += np.minimum(part, 1) if clip_tokens else part
    found = coactivation(weighted(), NEURONS, threshold, clip_tokens).double().numpy()
    # fp32 sums of 50 products.
    assert np.abs(found - expected).max() <= 1e-5 * expected.max()
    assert (expected == 0).any() == (threshold > 0)


def test_sketches_keep_angles() -> None:
    hidden, weight = everything(weighted(tokens=300))
    profiles = (hidden * np.sqrt(weight)[:, None])[:, NEURONS.numpy()].T
    unit = profiles / np.linalg.norm(profiles, axis=1, keepdims=True)
    found = torch.nn.functional.normalize(sketched_profiles(weighted(tokens=300), NEURONS, 4096, seed=3), dim=1)
    # Four standard deviations of a Gaussian projection's inner product, each at most sqrt(2 / size).
    assert np.abs((found @ found.T).numpy() - unit @ unit.T).max() <= 4 * (2 / 4096) ** 0.5


def test_sketches_do_not_depend_on_when_the_pass_is_made() -> None:
    first, again = (sketched_profiles(weighted(), NEURONS, 16, seed=3) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, sketched_profiles(weighted(), NEURONS, 16, seed=4))


def test_principal_profiles_have_the_inner_products_of_the_gram_matrix() -> None:
    gram = coactivation(weighted(), torch.arange(F))
    whole = principal_profiles(gram, F, seed=0)
    assert torch.allclose(whole @ whole.T, gram, atol=1e-4 * gram.max().item())
    values, vectors = torch.linalg.eigh(gram.double())
    best = (vectors[:, -5:] * values[-5:]) @ vectors[:, -5:].T
    found = principal_profiles(gram, 5, seed=0).double()
    assert found.shape == (F, 5)
    assert torch.allclose(found @ found.T, best, atol=1e-4 * gram.max().item())


def test_fewer_neurons_than_dimensions() -> None:
    assert torch.isfinite(principal_profiles(torch.zeros(4, 4), 256, seed=0)).all()
    assert principal_profiles(torch.eye(4), 256, seed=0).shape == (4, 4)
