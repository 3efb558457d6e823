"""What is observed of routers is what their papers and classes say, restated token by token in fp64 without any class's code."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from moe_oracle import some_windows, stock, watch

from upcycle.calibration.compressing.observe_moe import observe_layers
from upcycle.checkpoints.moe_checkpoint import MoeCheckpoint
from upcycle.methods.compressing.dropping.reap import reap_scores
from upcycle.methods.compressing.sparse_mixer import sparse_mixer
from upcycle.progress import SILENT

Models = Callable[..., Path]


def of_softmax(logits: list[float]) -> dict[int, float]:
    """The two largest of a softmax, normalised: a softmax of the two."""
    two = sorted(range(len(logits)), key=lambda e: -logits[e])[:2]
    powers = {e: math.exp(logits[e]) for e in two}
    return {e: power / sum(powers.values()) for e, power in powers.items()}


def of_sparse_mixer(jitter: float) -> Callable[[list[float]], dict[int, float]]:
    """The largest, then the largest that is left; each one's share of those that are near it."""

    def route(logits: list[float]) -> dict[int, float]:
        left, found = dict(enumerate(logits)), {}
        for _ in range(2):
            best = max(left, key=lambda e: left[e])
            top = left[best]
            near = [e for e, own in left.items() if (top - own) / max(abs(own), top) <= 2 * jitter]
            found[best] = math.exp(top) / sum(math.exp(left[e]) for e in near)
            del left[best]
        return found

    return route


ROUTERS = {
    "qwen3_vl_moe": of_softmax,
    "qwen3_5_moe": of_softmax,
    "granitemoehybrid": of_softmax,
    "gpt_oss": of_softmax,
    "phimoe": of_sparse_mixer(0.3),
    "phimoe-constant": of_sparse_mixer(0.0),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", ROUTERS)
def test_loads_weights_and_reap_are_those_of_the_stated_router(name: str, pico_moe: Models, tmp_path: Path) -> None:
    windows, folder = some_windows(4, 24), pico_moe(name)
    found = observe_layers(MoeCheckpoint.open(str(folder)), "keep", windows, {}, SILENT, tmp_path / "seen")
    for index, seen in watch(stock(folder), windows).items():
        stated = [ROUTERS[name](own) for own in seen.logits.tolist()]
        expected = torch.zeros(seen.logits.shape, dtype=torch.float64)
        for token, weights in enumerate(stated):
            for expert, weight in weights.items():
                expected[token, expert] = weight
        own = found.layers[index]
        torch.testing.assert_close(own.sample_weights.double(), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(own.load, (expected > 0).double().sum(0))
        scores = (expected * seen.outputs.norm(dim=-1)).sum(0) / (expected > 0).double().sum(0).clamp(min=1)
        torch.testing.assert_close(reap_scores(own), scores, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("jitter", [0.0, 0.01, 0.3, 5.0])
def test_sparse_mixer_is_stated_alike(jitter: float) -> None:
    logits = 2 * torch.randn(200, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[0] = torch.tensor([1.0, 1.0, -2.0, 0.0, 1.0])  # equal ones share
    experts, weights = sparse_mixer(logits, jitter)
    for token, own in enumerate(logits.tolist()):
        expected = of_sparse_mixer(jitter)(own)
        assert experts[token].tolist() == list(expected)
        assert weights[token].tolist() == pytest.approx(list(expected.values()), rel=1e-12)
